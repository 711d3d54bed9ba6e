"""Which label values are what is segmented."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.source import Array

Rule = str | tuple[int, ...]  # ">N" (greater than N), or ids
IGNORE = 255
"""Of an ingested label: nobody knows what is there. Losses and scores leave it out."""


def foreground_mask(
    label: Array, rule: Rule, what: str = "label", ignore: tuple[int, ...] = ()
) -> npt.NDArray[np.uint8]:
    """Turn label values (Y, X) into uint8: 0 background, 1 foreground, `IGNORE` for `ignore`.

    Bool, from a file of 1 bit a pixel, is foreground under ">N" whatever N.

    Raises:
        InputError: ids asked of a label with fractions; one value apart from 0, which ">N" leaves
            out.
    """
    mask = _mask(label, rule, what)
    for value in ignore:
        mask[label == value] = IGNORE
    return mask


def _mask(label: Array, rule: Rule, what: str) -> npt.NDArray[np.uint8]:
    if isinstance(rule, str):
        return label.astype(np.uint8) if label.dtype == bool else _above(label, rule, what)
    if label.dtype.kind == "f" and (label != np.round(label)).any():
        raise InputError(
            what,
            found="label values with fractions",
            expected=f"whole ids, as foreground is {list(rule)}",
            do="Use a threshold such as '>0.5' as `foreground`.",
        )
    mask = np.zeros(label.shape, bool)  # ten times as fast as `isin` for few ids
    for value in rule:
        mask |= label == value
    return mask.astype(np.uint8)


def _above(label: Array, rule: str, what: str) -> npt.NDArray[np.uint8]:
    mask = label > float(rule[1:])
    if not mask.any() and label.any() and len(values := np.unique(label)) <= 2:
        raise InputError(
            what,
            found=f"a label of the values {', '.join(f'{v:g}' for v in values)}",
            expected=f"some foreground where there are labels, and {rule} leaves none",
            do="Save it with the values that the other labels have, or change `foreground`.",
        )
    return mask.astype(np.uint8)
