"""Voxel sizes: units of length, what files state, and which sizes an EM volume can have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Voxel = tuple[float, float, float]  # (z, y, x) in nm

SMALLEST, LARGEST = 0.5, 1e8
"""Sizes in nm that voxels of EM and medical volumes may have, the last one excluded."""
LARGEST_EM = 10_000.0
"""From this size on, what a file states is doubted: mostly it is EM that has lost its unit."""
LONGEST = 300.0
"""How many times its shortest side a voxel is long; more is a unit that was lost on one axis."""
METRE_NM = 1e9
_NAMES = {
    1e-3: "pm picometer picometre",
    0.1: "a å angstrom ångström",
    1.0: "nm nanometer nanometre",
    1e3: "um µm μm micron micrometer micrometre",
    1e6: "mm millimeter millimetre",
    1e7: "cm centimeter centimetre",
    2.54e7: "in inch",
    METRE_NM: "m meter metre",
}
UNITS_NM = {name: factor for factor, names in _NAMES.items() for name in names.split()}


def in_nm(size: float, unit: str) -> float:
    """A size in nm; 0 where it is negative or the unit is none of length."""
    name = unit.strip().lower()
    return max(0.0, size) * UNITS_NM.get(name, UNITS_NM.get(name.removesuffix("s"), 0.0))


def as_voxel(values: Sequence[float]) -> Voxel:
    """Three sizes in nm with the digits that files mean: 0.005 um is 5 nm.

    Raises:
        ValueError: one is not finite, or as large as a metre: a damaged header.
    """
    z, y, x = (float(f"{v:.6g}") for v in values)
    if not all(abs(v) < METRE_NM for v in (z, y, x)):  # NaN is not
        raise ValueError(f"voxels of {z:g} x {y:g} x {x:g} nm")
    return z, y, x


def plausible(sizes_nm: Iterable[float], below: float = LARGEST_EM) -> bool:
    """Whether an EM volume can have voxels of these sizes."""
    return all(SMALLEST <= size < below for size in sizes_nm)


def agree(sizes_nm: Sequence[float], others_nm: Sequence[float]) -> bool:
    """Whether sizes are equal to 1 %, where both are known (not 0)."""
    pairs = zip(sizes_nm, others_nm, strict=True)
    return all(math.isclose(a, b, rel_tol=0.01) for a, b in pairs if a and b)


def said(sizes_nm: Sequence[float]) -> str:
    """Sizes as text: `30 x 4 x 4`; those that are not known as `?`."""
    return " x ".join(f"{size:g}" if size else "?" for size in sizes_nm)


def settled(stated: Mapping[str, Sequence[float]]) -> tuple[Voxel | None, str]:
    """The voxel size that a file states; else None, and what is wrong with what it states.

    Args:
        stated: by what states them, sizes (z, y, x) in nm; 0 for one that is not known.
    """
    known = {name: as_voxel(sizes) for name, sizes in stated.items() if any(sizes)}
    words = [f"{said(sizes)} nm ({name})" for name, sizes in known.items()]
    whole = [sizes for sizes in known.values() if all(sizes)]
    if not whole:
        return None, f"no whole voxel size in the file, only {words[0]}" if words else ""
    if not all(agree(whole[0], sizes) for sizes in known.values()):
        return None, f"voxel sizes in the file that disagree: {', '.join(words)}"
    if whole[0] in {(unit, unit, unit) for unit in UNITS_NM.values()}:
        return None, f"voxels of 1 x 1 x 1 in the file ({words[0]}), as if nobody had set a size"
    if not plausible(whole[0]) or max(whole[0]) > LONGEST * min(whole[0]):
        return None, f"voxels of {words[0]} in the file, which is no size of EM voxels"
    return whole[0], ""


def stated_sizes(
    attributes: Mapping[str, Any], names: Sequence[str] | None
) -> dict[str, list[float]]:
    """What attributes of HDF5 or Zarr state, (z, y, x) in nm, of an array whose axes have `names`.

    `element_size_um` is that of ilastik and Fiji. `resolution` and `voxel_size` are in nm (CREMI)
    if `units` beside them do not say otherwise, and in the order of the array's axes if `axes`
    beside them do not (N5 has x first).
    """
    axes, units = _words(attributes, "axes", "axis_names"), _words(attributes, "units", "unit")
    found = {"element_size_um": _sizes(attributes.get("element_size_um"), "zyx", ["um"])}
    for key in ("resolution", "voxel_size"):
        for order in [order for order in (axes, names) if order] or ["zyx"]:
            sizes = _sizes(attributes.get(key), order, units or ["nm"])
            found[f"`{key}` as {' '.join(order)}"] = sizes
    return found


def _sizes(values: Any, axes: Sequence[str], units: list[str]) -> list[float]:
    """Sizes (z, y, x) in nm of values in the order of these axes; 0 where nothing fits."""
    values = np.ravel(values)
    if len(axes) != len(values):
        axes = [axis for axis in axes if axis in "zyx"]
    units = units * len(axes) if len(units) == 1 else units
    if values.dtype.kind not in "iuf" or not len(values) == len(axes) == len(units):
        return [0.0] * 3
    known = {a: in_nm(float(v), u) for a, v, u in zip(axes, values, units, strict=True)}
    return [known.get(axis, 0.0) for axis in "zyx"]


def _words(attributes: Mapping[str, Any], *keys: str) -> list[str]:
    """The first of these attributes that is there as words; `xyz` and `x,y,z` are three."""
    values: Any = next((attributes[key] for key in keys if key in attributes), [])
    texts = [v.decode() if isinstance(v, bytes) else str(v) for v in np.ravel(values)]
    words = [word.lower() for text in texts for word in text.replace(",", " ").split()]
    return list(words[0]) if words and set(words[0]) == set("xyz") else words
