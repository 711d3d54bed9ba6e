"""Which label values are what is segmented."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.source import Array

Rule = str | tuple[int, ...]  # ">N" (greater than N), or ids
IGNORE = 255
"""Of an ingested label: nobody knows what is there. Losses and scores leave it out."""


RARE = 1e-3
"""Share of pixels below which a value is a stray one, as anti-aliased edges have them."""


def foreground_mask(
    label: Array, rule: Rule, what: str = "label", ignore: tuple[int, ...] = ()
) -> npt.NDArray[np.uint8]:
    """Turn label values (Y, X) into uint8: 0 background, 1 foreground, `IGNORE` for `ignore`.

    Bool, from a file of 1 bit a pixel, is foreground under ">N" whatever N.

    Raises:
        InputError: ids asked of a label with fractions; one value apart from 0, which ">N" leaves
            out.
    """
    if not isinstance(rule, str) and label.dtype.kind == "f" and (label != np.round(label)).any():
        raise InputError(
            what,
            found="label values with fractions",
            expected=f"whole ids, as foreground is {list(rule)}",
            do="Use a threshold such as '>0.5' as `foreground`.",
        )
    mask = np.zeros(label.shape, np.uint8)
    if isinstance(rule, str):
        mask[label if label.dtype == bool else label > float(rule[1:])] = 1
    else:
        for value in rule:  # ten times as fast as `isin` for few ids
            mask[label == value] = 1
    for value in ignore:
        mask[label == value] = IGNORE
    if isinstance(rule, str) and not (mask == 1).any():
        _check_left_out(label[(mask == 0) & (label != 0)], label.size, rule, what)
    return mask


def foreground_share(mask: npt.NDArray[np.uint8]) -> float:
    """Share of foreground in what is known of a mask."""
    return int((mask == 1).sum()) / max(1, int((mask != IGNORE).sum()))


def _check_left_out(labelled: Array, pixels: int, rule: str, what: str) -> None:
    """Refuse a slice whose labels have one value, below the rule's."""
    if labelled.size > RARE * pixels and len(values := np.unique(labelled)) == 1:
        raise InputError(
            what,
            found=f"a label of 0 and {values[0]:g}",
            expected=f"some foreground where there are labels, and {rule} leaves none",
            do="Save it with the values that the other labels have, or change `foreground`.",
        )
