"""A dataset: public sources, synthetic EM, pairing, splits, ingest, alignment of grey values,
tiles, training samples. It knows no model."""
