"""A user's volume to a mask, objects and surfaces; preview, export, the registry, napari.

It knows how a trained model is applied to a volume of any size, in blocks that are kept as they are
done. It trains nothing, and knows neither the command line nor the functions for notebooks.
"""
