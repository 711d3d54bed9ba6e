"""How far apart datasets are for a model: Fréchet distance, probes, neighbours, PCA.

It trains nothing.
"""
