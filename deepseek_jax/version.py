"""The package's version: it stands in every file the package writes."""

__version__ = "0.1.0"
