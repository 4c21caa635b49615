"""Any timm vision model as a HoVLE distillation teacher."""
