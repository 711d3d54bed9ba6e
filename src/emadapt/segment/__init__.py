"""A user's volume to a mask, objects and surfaces; preview, export, napari. It trains nothing."""
