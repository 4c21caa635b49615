"""LoRA adapters in HoVLE training runs, merged on export."""
