"""Recipes, stages and the loop that trains HoVLE on Ray Train."""

__version__ = "0.1.0"
