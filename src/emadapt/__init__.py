"""Adapt vision foundation models to electron microscopy, and measure how far that carries."""

__version__ = "0.1.0"
