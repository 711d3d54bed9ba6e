"""Which label values are what is segmented."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.source import Array

Rule = str | tuple[int, ...]  # ">N" (greater than N), or ids
IGNORE = 255
"""Of an ingested label: nobody knows what is there. Losses and scores leave it out."""
OCCUPANCY = 0.5
"""Share of a patch's known pixels from which its token counts as foreground."""
BOUNDARY_NM = 25.0
"""Width of the boundary of an object, inside it."""
RARE = 1e-3
"""Share of pixels below which a value is a stray one, as anti-aliased edges have them."""


def class_ids(
    label: Array, rules: Sequence[Rule], what: str = "label", ignore: tuple[int, ...] = ()
) -> npt.NDArray[np.uint8]:
    """Turn label values (Y, X) into uint8: 0 background, 1, 2, ... by rule, `IGNORE` for `ignore`.

    Bool, from a file of 1 bit a pixel, is foreground under ">N" whatever N.

    Raises:
        InputError: ids asked of a label with fractions; one value apart from 0, which ">N" leaves
            out.
    """
    mask = np.zeros(label.shape, np.uint8)
    for number, rule in enumerate(rules, 1):
        if isinstance(rule, str):
            mask[label if label.dtype == bool else label > float(rule[1:])] = number
            continue
        if label.dtype.kind == "f" and (label != np.round(label)).any():
            raise InputError(
                what,
                found="label values with fractions",
                expected=f"whole ids, as foreground is {list(rule)}",
                do="Use a threshold such as '>0.5' as `foreground`.",
            )
        for value in rule:  # ten times as fast as `isin` for few ids
            mask[label == value] = number
    for value in ignore:
        mask[label == value] = IGNORE
    for rule in rules:
        if isinstance(rule, str) and not is_foreground(mask).any():
            _check_left_out(label[(mask == 0) & (label != 0)], label.size, rule, what)
    return mask


def with_boundaries(
    ids: npt.NDArray[np.uint8], label: Array, pixel_nm: float
) -> npt.NDArray[np.uint8]:
    """Class ids with 2 where another object or the background is within BOUNDARY_NM, else 1.

    Args:
        ids: (Y, X), 1 in the foreground.
        label: numbers of the objects, or one number for all.
        pixel_nm: side of a pixel.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    reach = max(1, round(BOUNDARY_NM / pixel_nm))
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    objects = np.where(ids == 1, label, 0)
    alike = maximum_filter(objects, footprint=disc) == minimum_filter(objects, footprint=disc)
    return np.where(alike | (ids != 1), ids, np.uint8(2))


def is_foreground(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where class ids are of any class."""
    return (ids != 0) & (ids != IGNORE)


def masks_of(ids: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.bool_]:
    """Class ids (Y, X) to masks: of all classes as one (Y, X), of several (classes, Y, X)."""
    if classes == 1:
        return is_foreground(ids)
    return np.asarray(ids == np.arange(1, classes + 1, dtype=np.uint8)[:, None, None])


def most_probable(
    probability: npt.NDArray[np.float32], threshold: float = 0.5
) -> npt.NDArray[np.uint8]:
    """Class ids (Y, X) of probabilities (Y, X), or of several classes (classes, Y, X).

    Of one class the id is 1 above `threshold`. Of several it is the most probable one; the
    background's probability is what is left to 1.
    """
    if probability.ndim == 2:
        return (probability > threshold).astype(np.uint8)
    found = probability.argmax(0).astype(np.uint8) + np.uint8(1)
    return np.where(probability.max(0) > 1 - probability.sum(0), found, np.uint8(0))


def patch_classes(labels: npt.NDArray[np.uint8], axes: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Class ids of patches, whose pixels lie along `axes`; of several classes the most frequent.

    0 where less than `OCCUPANCY` is foreground, NaN where fewer than half of the pixels are known.
    """
    known = (labels != IGNORE).mean(axes, dtype=np.float32)
    share = is_foreground(labels).mean(axes, dtype=np.float32) / np.maximum(known, 0.5)
    ids = range(1, 1 + int(labels.max(initial=1, where=labels != IGNORE)))
    frequent = np.float32(1) + np.argmax([(labels == own).sum(axes) for own in ids], 0)
    found = np.where(share >= OCCUPANCY, frequent, 0).astype(np.float32)
    return np.where(known < 0.5, np.float32(np.nan), found)


def foreground_share(mask: npt.NDArray[np.uint8]) -> float:
    """Share of foreground in what is known of a mask."""
    return int(is_foreground(mask).sum()) / max(1, int((mask != IGNORE).sum()))


def _check_left_out(labelled: Array, pixels: int, rule: str, what: str) -> None:
    """Refuse a slice whose labels have one value, below the rule's."""
    if labelled.size > RARE * pixels and len(values := np.unique(labelled)) == 1:
        raise InputError(
            what,
            found=f"a label of 0 and {values[0]:g}",
            expected=f"some foreground where there are labels, and {rule} leaves none",
            do="Save it with the values that the other labels have, or change `foreground`.",
        )
