"""Train, validation and test as blocks of z with a gap: neighbouring EM slices are near copies, so random slices leak."""

from __future__ import annotations

import math

import numpy as np

from emadapt.config import SplitSpec
from emadapt.errors import InputError

Split = dict[str, list[int]]


def split_slices(parts: list[tuple[str, int]], spec: SplitSpec, voxel_z_nm: float, what: str = "volume") -> Split:
    """Assign slices of the concatenated parts to `train`, `val` and `test`; slices in the gaps belong to none.

    Args:
        parts: (name, number of slices) in order, either [("train", n), ("test", m)] (official test volume) or [("all", n)].
        spec: shares and gap.
        voxel_z_nm: thickness of a slice in nm, which turns the gap into slices (at least one).
        what: what to call the volume in an error.

    Returns:
        Sorted slice numbers of the concatenated volume for each of `train`, `val`, `test`. In a block split the order
        along z is train, gap, val(, gap, test).

    Raises:
        InputError: too few slices for three non-empty blocks and their gaps.
    """
    total = parts[0][1]
    official = [n for name, n in parts if name == "test"]
    n_test = sum(official) if official else max(1, round(spec.test * total))
    n_val = max(1, round(spec.val * (total if official else total - n_test)))
    gap = max(1, math.ceil(spec.gap_nm / voxel_z_nm)) if spec.kind == "blocks" else 0
    n_train = total - n_val - gap - (0 if official else n_test + gap)
    if n_train < 1 or n_test < 1:
        need = f"1 train + {n_val} val" + ("" if official else f" + {n_test} test") + f" and gaps of {gap} between them"
        raise InputError(what, found=f"{total} slices", expected=f"at least {total - n_train + 1} ({need})",
                         do="Use a thicker volume, or lower split.gap_nm.")  # fmt: skip
    if spec.kind == "random":
        order = np.random.default_rng(spec.seed).permutation(total)
        cuts = [order[:n_train], order[n_train : n_train + n_val], order[n_train + n_val :]]
        train, val, test = (sorted(int(z) for z in c) for c in cuts)
    else:
        train = list(range(n_train))
        val = list(range(n_train + gap, n_train + gap + n_val))
        test = list(range(total - n_test, total))
    if official:
        test = list(range(total, total + n_test))
    return {"train": train, "val": val, "test": test}
