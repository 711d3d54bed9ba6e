"""Train, validation and test as blocks of z with a gap, or as whole volumes.

Neighbouring EM slices are near copies, so random slices leak from training to test.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from emadapt.data.pairing import Part
from emadapt.errors import InputError
from emadapt.study.datasets import DatasetSettings, SplitSettings

Split = dict[str, list[int]]


def split_slices(
    parts: Sequence[tuple[str, int]],
    spec: SplitSettings,
    voxel_z_nm: float,
    what: str = "volume",
    of: str = "slices",
) -> Split:
    """Assign slices of the concatenated parts to `train`, `val` and `test`, or to a gap.

    Args:
        parts: (name, number of slices): [("train", n), ("test", m)] with an official test volume,
            or [("all", n)].
        spec: shares and gap.
        voxel_z_nm: thickness of a slice, which turns the gap into slices (at least one).
        what: for errors.
        of: what is split: `volumes` of a dataset may take the place of slices.

    Returns:
        Sorted slice numbers; in a block split, train, gap, val(, gap, test) along z.

    Raises:
        InputError: too few slices for three non-empty blocks and their gaps.
    """
    total = parts[0][1]
    official = [n for name, n in parts if name == "test"]
    n_test = sum(official) if official else max(1, round(spec.test * total)) * (spec.test > 0)
    n_val = max(1, round(spec.val * (total if official else total - n_test)))
    has_gap = spec.kind == "blocks" and spec.gap_nm > 0
    gap = max(1, math.ceil(spec.gap_nm / voxel_z_nm)) if has_gap else 0
    n_train = total - n_val - gap - (0 if official or not n_test else n_test + gap)
    if n_train < 1 or (official and n_test < 1):
        need = f"1 train + {n_val} val" + ("" if official else f" + {n_test} test")
        raise InputError(
            what,
            found=f"{total} {of}",
            expected=f"at least {total - n_train + 1} ({need} and gaps of {gap} between them)",
            do=f"Use more {of}, or lower split.gap_nm.",
        )
    if spec.kind == "random":
        order = np.random.default_rng(spec.seed).permutation(total)
        cuts = [order[:n_train], order[n_train : n_train + n_val], order[n_train + n_val :]]
        train, val, test = (sorted(int(z) for z in cut) for cut in cuts)
    else:
        train = list(range(n_train))
        val = list(range(n_train + gap, n_train + gap + n_val))
        test = list(range(total - n_test, total))
    if official:
        test = list(range(total, total + n_test))
    return {"train": train, "val": val, "test": test}


def split_of(
    dataset: DatasetSettings, spec: SplitSettings, parts: Sequence[Part], what: str
) -> Split:
    """Training, validation and test slices of a dataset; without labels, all are for training."""
    ends = ends_of(parts)
    if not dataset.labelled:
        return {"train": list(range(ends[-1])), "val": [], "test": []}
    if not (dataset.synthetic or dataset.of_volumes):
        sizes = [(part.name, part.depth) for part in parts]
        return split_slices(sizes, spec, dataset.voxel_nm[0], what)
    # Whole domains or volumes; with a gap, one is left out between blocks.
    numbers = list(Counter(part.name for part in parts).items())
    chosen = split_slices(numbers, spec, np.inf, what, of="volumes")
    slices = [range(*pair) for pair in itertools.pairwise(ends)]
    return {part: [z for k in own for z in slices[k]] for part, own in chosen.items()}


def ends_of(parts: Sequence[Part]) -> list[int]:
    """Where each part begins, and the number of all slices."""
    return [0, *itertools.accumulate(part.depth for part in parts)]


def runs_of(slices: Sequence[int], ends: Collection[int] = ()) -> list[list[int]]:
    """Slices in runs of consecutive numbers; none goes on at one of `ends`, where a part begins."""
    runs: list[list[int]] = []
    for z in sorted(slices):
        if runs and z == runs[-1][-1] + 1 and z not in ends:
            runs[-1].append(z)
        else:
            runs.append([z])
    return runs


def starts_in(runs: Sequence[Sequence[int]], depth: int, *, apart: bool = False) -> list[int]:
    """First slices of patches of `depth` in `runs`; `apart`: only as many as cover each run."""
    starts = []
    for run in runs:
        last = len(run) - depth
        if last < 0:
            continue
        n = 1 + math.ceil(last / depth)
        inside = evenly_spaced(last + 1, n) if apart else range(last + 1)
        starts += [run[k] for k in inside]
    return starts


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most so many of the numbers below n, evenly spaced, with the first and the last."""
    return [round(k) for k in np.linspace(0, n - 1, min(most, n))]


def check_depth(what: str, runs: Sequence[Sequence[int]], patch: tuple[int, int, int]) -> None:
    """Refuse a patch (z, y, x) deeper than any run of consecutive training slices."""
    deepest = max(map(len, runs), default=0)
    if deepest < patch[0]:
        raise InputError(
            what,
            found=f"a volume thinner than the patch: at most {deepest} consecutive training slices",
            expected=f"{patch[0]}, the depth of `patch: {list(patch)}`",
            do="Lower the first number of the regime's `patch`, or take a thicker volume;"
            " `split.kind: random` leaves few slices together.",
        )
