"""Networks: backbones, weights, adapters, heads, networks from scratch.

Also the token cache, and the prediction of slices and blocks. It does not know how a model is
trained or scored.
"""
