"""Backbones, weights, adapters, heads, networks from scratch, the token cache, prediction of
slices and blocks. It does not know how a model is trained or scored."""
