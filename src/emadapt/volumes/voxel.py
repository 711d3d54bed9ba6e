"""Voxel sizes: units of length, and what attributes of HDF5 and Zarr state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Voxel = tuple[float, float, float]  # (z, y, x) in nm

METRE_NM = 1e9
_NAMES = {
    1e-3: "pm picometer picometre",
    0.1: "a å angstrom",
    1.0: "nm nanometer nanometre",
    1e3: "um µm μm micron microns micrometer micrometre",
    1e6: "mm millimeter millimetre",
    1e7: "cm centimeter centimetre",
    METRE_NM: "m meter metre",
}
UNITS_NM = {name: factor for factor, names in _NAMES.items() for name in names.split()}


def in_nm(size: float, unit: str) -> float:
    """A size in nm; 0 where it is negative or the unit is none of length."""
    return max(0.0, size) * UNITS_NM.get(unit.strip().lower(), 0.0)


def as_voxel(values: Sequence[float]) -> Voxel:
    """Three sizes in nm with the digits that files mean: 0.005 um is 5 nm.

    Raises:
        ValueError: one is not finite, or as large as a metre: a damaged header.
    """
    z, y, x = (float(f"{v:.6g}") for v in values)
    if not all(abs(v) < METRE_NM for v in (z, y, x)):  # NaN is not
        raise ValueError(f"voxels of {z:g} x {y:g} x {x:g} nm")
    return z, y, x


def known_voxel(sizes_nm: Sequence[float]) -> Voxel | None:
    """The voxel, if all three sizes are known, i.e. above 0."""
    return as_voxel(sizes_nm) if len(sizes_nm) == 3 and all(s > 0 for s in sizes_nm) else None


def stated_voxel(attributes: Mapping[str, Any]) -> Voxel | None:
    """Voxel size from `element_size_um` (ilastik, Fiji) or `resolution` in nm (CREMI, N5)."""
    for key, unit in (("element_size_um", "um"), ("resolution", "nm")):
        values = np.asarray(attributes.get(key, ())).ravel()
        if len(values) == 3 and values.dtype.kind in "iuf" and (values > 0).all():
            return as_voxel([in_nm(float(value), unit) for value in values])
    return None
