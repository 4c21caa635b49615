"""Frozen parts of a HoVLE in int8 while the rest trains."""
