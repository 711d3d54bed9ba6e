"""Files that hold volumes.

TIFF, PNG folders, HDF5, Zarr, OME-Zarr, NIfTI, read a block at a time, and the writers. It knows
nothing of datasets, labels or models.
"""
