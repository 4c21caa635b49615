"""W&B as an observer of HoVLE runs."""
