"""The demo: real data from PyPI packages, three stages, an evaluation and a report."""
