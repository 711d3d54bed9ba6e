"""A dataset: where it comes from and how it becomes training samples.

Public sources, synthetic EM, pairing, splits, ingest, alignment of grey values, tiles and samples.
It knows no model.
"""
