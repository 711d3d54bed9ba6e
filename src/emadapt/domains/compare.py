"""All that is measured about two datasets under one model.

Slices of a volume are near copies of their neighbours. So slices are never shuffled one by one: the
null, the bootstrap and the cross-validation all work on blocks of z.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t
from threadpoolctl import threadpool_limits

from emadapt.data.splits import evenly_spaced
from emadapt.domains import frechet, knn, probe
from emadapt.domains.features import Features
from emadapt.domains.moments import z_blocks
from emadapt.errors import InputError
from emadapt.study.training import DiagnoseSettings

FRACTIONS = (0.4, 0.5, 0.65, 0.8, 1.0)
"""Shares of the slices from which the distance is extrapolated to infinitely many."""
DRAWS = 4
"""Random choices of slices for each share."""
PROBE_TOKENS = 1500
MOST_HALVES = 50
"""Ways to halve a dataset that are tried at most, for its null."""

Numbers = npt.NDArray[np.int64]
Distance = Callable[[Numbers, Numbers], float]
"""Fréchet distance of two datasets, of the slices that stand for each."""

one_thread = threadpool_limits.wrap(1, user_api="blas")
"""Thousands of small problems: BLAS threads inside each of them cost six times what they save."""


@dataclass(frozen=True)
class Population:
    """What is compared of a dataset under a model.

    Attributes:
        features: of the dataset.
        level: "token" or "pixel" (all tokens of all slices), or "image" (one mean token per slice).
    """

    features: Features
    level: str

    @property
    def of_slices(self) -> bool:
        """Whether its members are slices, not tokens."""
        return self.level == "image"

    def count(self) -> int:
        """Number of members."""
        return len(self.places()) if self.of_slices else int(self.features.moments.count.sum())

    def places(self) -> Numbers:
        """Places of the slices that have members."""
        return np.flatnonzero(self.features.moments.count > 0)

    def variance(self) -> float:
        """Total variance of the members."""
        moments = self.features.moments
        if self.of_slices:
            return float(moments.slice_means()[self.places()].var(0, ddof=1).sum())
        return float(np.trace(moments.merged(self.places())[2]))

    def sample(self, most: int, blocks: int) -> tuple[npt.NDArray[np.float32], Numbers]:
        """At most so many members (n, D), and the z-block of each (n,).

        Blocks are of the slices that have members: one without any could not be held out.
        """
        if self.of_slices:
            means = self.features.moments.slice_means()[self.places()].astype(np.float32)
            return means, z_blocks(len(means), blocks)
        thin = evenly_spaced(len(self.features.tokens), most)
        slices, place = np.unique(self.features.at, return_inverse=True)
        return self.features.tokens[thin], z_blocks(len(slices), blocks)[place[thin]]

    def distance_to(self, other: Population) -> Distance:
        """How far these members are from those of another dataset."""
        a, b = self.features.moments, other.features.moments
        if self.of_slices:
            means_a, means_b = a.slice_means(), b.slice_means()
            return lambda i, j: frechet.frechet_samples(means_a[i], means_b[j])
        return lambda i, j: frechet.frechet(*a.merged(i)[1:], *b.merged(j)[1:])


@one_thread
def compare(
    a: Features, b: Features, level: str, spec: DiagnoseSettings, null: float | None = None
) -> dict[str, Any]:
    """One entry of `pairs`: distances of two datasets, their null and interval, and probes.

    Args:
        a: one dataset.
        b: the other, under the same model.
        level: of `Population`.
        spec: blocks, permutations, replicates.
        null: largest distance between halves of one dataset; None: of `a` or `b`.
    """
    one, other = Population(a, level), Population(b, level)
    n = [one.count(), other.count()]
    between, every = one.distance_to(other), (one.places(), other.places())
    found = between(*every)
    if null is None:
        null = max(split_half_null(f, level, spec) for f in (a, b))
    blocks = min(spec.blocks, *(len(places) for places in every))
    (x_a, blocks_a), (x_b, blocks_b) = (p.sample(PROBE_TOKENS, blocks) for p in (one, other))
    separated = probe.domain_probe(
        {a.name: (x_a, blocks_a), b.name: (x_b, blocks_b)},
        permutations=spec.permutations,
        seed=spec.seed,
    )
    neighbours = 5 if one.of_slices else 10
    return {
        "a": a.name,
        "b": b.name,
        "level": level,
        "n": n,
        "frechet": _round(found),
        "relative": _round(found / float(np.mean([one.variance(), other.variance()]))),
        "frechet_inf": _round(_infinite(between, every, spec)),
        "ci95": _interval(between, every, found, spec),
        "null": null,
        "reads_as": "different" if _round(found) > null else "same",
        "probe": {
            "balanced_accuracy": _round(separated.balanced_accuracy),
            "p_value": _round(separated.p_value),
        },
        "knn_mixing": _round(knn.domain_mixing(x_a, blocks_a, x_b, blocks_b, k=neighbours)),
    }


@one_thread
def split_half_null(f: Features, level: str, spec: DiagnoseSettings) -> float:
    """Largest distance between halves of one dataset, over the ways to halve its z-blocks.

    Of more than `MOST_HALVES` ways so many are drawn.

    The two contiguous halves are one of the ways. Halves have half the slices, so their sampling
    error is larger than that of whole datasets: a distance above this is no sampling artefact, and
    no drift along z.

    Raises:
        InputError: all tokens are in one z-block.
    """
    own = Population(f, level)
    places = own.places()
    block = z_blocks(len(f.slices), spec.blocks)[places]
    members = np.ones(len(places)) if own.of_slices else f.moments.count[places]
    draws = []
    for half in _halves(spec):
        inside = np.isin(block, half)
        if min(members[inside].sum(), members[~inside].sum()) > 1:
            draws.append((places[inside], places[~inside]))
    if not draws:
        raise InputError(
            f"dataset {f.name}",
            found="tokens with a known label in one block of z only",
            expected=f"in two of {spec.blocks} at least",
            do="Look at its label rule and at `ignore`.",
        )
    return _round(max(_each(own.distance_to(own), draws)))


def segmentation(a: Features, b: Features) -> dict[str, Any]:
    """How well labels carry over: held-out tokens of `b`, labelled by training tokens of `a`.

    Of several classes `knn_iou` is the mean over them, and `classes` has each.
    """
    train, held = a.within("train"), b.within("val", "test")
    iou = knn.segmentation_iou(
        a.tokens[train], a.ids[train], b.tokens[held], b.ids[held], len(a.classes)
    )
    entry = {"train": a.name, "test": b.name, "knn_iou": _round(float(iou.mean()))}
    by_class = dict(zip(a.classes, map(_round, iou.tolist()), strict=True))
    return entry | ({"classes": by_class} if len(by_class) > 1 else {})


def _halves(spec: DiagnoseSettings) -> list[tuple[int, ...]]:
    """Blocks of one half, in all ways or `MOST_HALVES` of them, the contiguous one first."""
    ways = itertools.combinations(range(spec.blocks), spec.blocks // 2)
    halves = [half for half in ways if 0 in half or spec.blocks % 2]
    if len(halves) <= MOST_HALVES:
        return halves
    rng = np.random.default_rng(spec.seed)
    chosen = rng.choice(np.arange(1, len(halves)), MOST_HALVES - 1, replace=False)
    return [halves[0], *(halves[i] for i in sorted(chosen))]


def _each(between: Distance, draws: Sequence[tuple[Numbers, ...]]) -> list[float]:
    """Distances of many draws in parallel; LAPACK releases Python's lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda draw: between(*draw), draws))


def _infinite(between: Distance, every: tuple[Numbers, ...], spec: DiagnoseSettings) -> float:
    """FD-infinity over the number of slices (Chong & Forsyth 2020, who have samples)."""
    rng = np.random.default_rng(spec.seed)
    sizes = [share for share in FRACTIONS for _ in range(1 if share == 1.0 else DRAWS)]
    draws = [
        tuple(np.sort(rng.choice(e, max(2, round(share * len(e))), replace=False)) for e in every)
        for share in sizes
    ]
    return frechet.extrapolate(sizes, _each(between, draws))


def _interval(
    between: Distance, every: tuple[Numbers, ...], found: float, spec: DiagnoseSettings
) -> list[float]:
    """95 % interval over blocks of slices, around the distance less its bias.

    Spread and bias are those of a moving-block bootstrap. Blocks are few, so the spread is widened
    to be unbiased, and Student's t has one degree of freedom less than there are blocks.
    """
    rng = np.random.default_rng(spec.seed)

    def moving_blocks(n: int) -> Numbers:
        length = max(1, n // spec.blocks)
        starts = rng.integers(0, n - length + 1, -(-n // length))
        return np.asarray((starts[:, None] + np.arange(length)).ravel()[:n])

    draws = [tuple(e[moving_blocks(len(e))] for e in every) for _ in range(spec.replicates)]
    drawn = _each(between, draws)
    blocks = min(spec.blocks, *map(len, every))
    spread = float(np.std(drawn)) * (blocks / (blocks - 1)) ** 0.5 * float(t.ppf(0.975, blocks - 1))
    middle = 2 * found - float(np.mean(drawn))
    return [_round(max(0.0, end)) for end in (middle - spread, middle + spread)]


def _round(value: float) -> float:
    return float(f"{value:.6g}")
