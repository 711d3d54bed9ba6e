"""Diagnostics: how far apart datasets are for a model. Pure functions on arrays; who calls them reads and writes."""
