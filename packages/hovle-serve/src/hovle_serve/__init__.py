"""Talking to a HoVLE."""

__version__ = "0.1.0"
