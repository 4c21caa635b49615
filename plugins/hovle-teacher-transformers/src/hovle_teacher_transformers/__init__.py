"""Vision towers of transformers models as HoVLE distillation teachers."""
