"""Everything that is said about two datasets under one model, each number with what it must be read against.

Slices of a volume are near copies of their neighbours, so slices are never shuffled one by one: the null, the bootstrap and
the cross-validation all work on blocks of z.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from emadapt.domains import frechet, knn, outliers, probe, similarity
from emadapt.domains.features import Features
from emadapt.domains.moments import CLASSES, z_blocks
from emadapt.errors import InputError
from emadapt.study.study import DiagnoseSettings

Numbers = npt.NDArray[np.int64]
Distance = Callable[[Numbers, Numbers], float]
FRACTIONS = (0.4, 0.5, 0.65, 0.8, 1.0)
"""Shares of the slices from which the distance is extrapolated to infinitely many."""
DRAWS = 4
"""Random choices of slices per share."""
FEWEST = 4
"""Slices with a class below which nothing is said of it."""
PROBE_TOKENS = 1500
MMD_TOKENS = 1000

one_thread = threadpool_limits.wrap(1, user_api="blas")
"""Thousands of small problems: BLAS threads inside each of them cost six times what they save."""


@one_thread
def compare(
    a: Features,
    b: Features,
    level: str,
    cls: str,
    spec: DiagnoseSettings,
    nulls: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """One entry of `pairs`: distances, their null and intervals, domain probe, mixing and MMD of two datasets.

    Args:
        a: one dataset.
        b: the other, under the same model.
        level: "token" or "pixel" (all tokens of all slices), or "image" (one mean token per slice).
        cls: "all", "foreground" or "background"; of "image" only "all".
        spec: blocks, permutations, replicates.
        nulls: of whole datasets, where `a` and `b` are parts of one; None: split halves of `a` and `b`.

    Raises:
        InputError: a class is in too few slices (see `measurable`).
    """
    n = [_count(f, level, cls) for f in (a, b)]
    between = _distance(a, b, level, cls)
    every = tuple(_places(f, level, cls) for f in (a, b))
    found = between(*every)
    if nulls is None:
        nulls = {f.name: split_half_null(f, level, cls, spec) for f in (a, b)}
    null = max(value["max"] for value in nulls.values())
    blocks = (
        min(spec.blocks, *(len(np.unique(_tokens(f, cls)[1])) for f in (a, b)))
        if level != "image"
        else spec.blocks
    )
    xa, xb = (_sample(f, level, cls, PROBE_TOKENS, blocks) for f in (a, b))
    separated = probe.domain_probe(
        xa[0],
        xa[1],
        xb[0],
        xb[1],
        permutations=spec.permutations,
        seed=spec.seed,
        names=(a.name, b.name),
    )
    few = 5 if level == "image" else 10
    some = [x[0][:: -(-len(x[0]) // MMD_TOKENS)] for x in (xa, xb)]
    return {
        "a": a.name,
        "b": b.name,
        "level": level,
        "class": cls,
        "n": n,
        "slices": [len(f.slices) for f in (a, b)],
        "frechet": _round(found),
        "relative": _round(found / _variance(a, b, level, cls)),
        "frechet_inf": _round(_infinite(between, every, spec)),
        "ci95": _interval(between, every, found, spec),
        "null": _round(null),
        "nulls": nulls,
        "reads_as": "different" if _round(found) > null else "same",
        "probe": {
            "balanced_accuracy": _round(separated.balanced_accuracy),
            "auroc": _round(separated.auroc),
            "p_value": _round(separated.p_value),
            "n": list(separated.n),
        },
        "knn_mixing": _round(knn.domain_mixing(xa[0], xa[1], xb[0], xb[1], k=few)),
        "mmd2": _round(similarity.mmd2(*some)),
    }


@one_thread
def split_half_null(f: Features, level: str, cls: str, spec: DiagnoseSettings) -> dict[str, float]:
    """Distances between halves of one dataset, each half made of z-blocks, over all ways to halve the blocks.

    The two contiguous halves are one of the ways. Halves hold half the slices, so sampling error is larger than between two
    whole datasets: a distance above the largest of these is not a sampling artefact, and not what drift along z makes.
    """
    within, block = _distance(f, f, level, cls), z_blocks(len(f.slices), spec.blocks)
    everything = set(range(spec.blocks))
    halves = [
        half
        for half in itertools.combinations(range(spec.blocks), spec.blocks // 2)
        if 0 in half or spec.blocks % 2
    ]
    if len(halves) > 50:  # the first is the contiguous one
        chosen = np.random.default_rng(spec.seed).choice(
            np.arange(1, len(halves)), 49, replace=False
        )
        halves = [halves[0], *(halves[i] for i in sorted(chosen))]
    draws = []
    for half in halves:
        one, other = (
            np.flatnonzero(np.isin(block, sorted(part)))
            for part in (set(half), everything - set(half))
        )
        if level == "image" or min(f.moments.merged(i, cls)[0] for i in (one, other)) > 1:
            draws.append((one, other))
    found = _each(within, draws)
    if not found:
        raise InputError(
            f"dataset {f.name}",
            found=f"{cls} tokens in one z-block only",
            do="Raise `diagnose.slices`.",
            expected=f"{cls} tokens in at least two of the {spec.blocks} blocks",
        )
    return {"mean": _round(np.mean(found)), "max": _round(max(found)), "splits": len(found)}


@one_thread
def segmentation(a: Features, b: Features, spec: DiagnoseSettings) -> dict[str, Any]:
    """What tokens of `a` with their labels say about those of `b` (the same dataset: about its held-out slices).

    Linear probe of foreground against background: within a dataset cross-validated over z-blocks, across fitted on all of
    `a`. kNN: tokens of val and test slices, labelled by training tokens.
    """
    a_x, a_blocks, a_y = _sample(a, "token", "all", len(a.tokens), spec.blocks, labels=True)
    seeded: dict[str, Any] = {
        "permutations": spec.permutations,
        "seed": spec.seed,
        "names": (a.name, b.name),
    }
    if a is b:
        found = probe.foreground_probe(a_x, a_y, a_blocks, **seeded)
    else:
        found = probe.foreground_probe(a_x, a_y, a_blocks, b.tokens, b.foreground, **seeded)
    train, held = np.isin(a.at, a.places("train")), np.isin(b.at, b.places("val", "test"))
    iou = knn.segmentation_iou(
        a.tokens[train], a.foreground[train], b.tokens[held], b.foreground[held]
    )
    return {
        "train": a.name,
        "test": b.name,
        "n": [int(train.sum()), int(held.sum())],
        "knn_iou": _round(iou),
        "probe": {
            "balanced_accuracy": _round(found.balanced_accuracy),
            "auroc": _round(found.auroc),
            "p_value": _round(found.p_value),
            "n": list(found.n),
        },
    }


@one_thread
def outlyingness(a: Features, b: Features) -> dict[str, Any]:
    """Whether `b` is an outlier to the training slices of `a` more than `a`'s own held-out slices are."""
    train, held = np.isin(a.at, a.places("train")), np.isin(a.at, a.places("val", "test"))
    found = outliers.outlier_auroc(a.tokens[train], a.tokens[held], a.at[held], b.tokens, b.at)
    return {
        "train": a.name,
        "test": b.name,
        "auroc_token": _round(found.token),
        "auroc_slice": _round(found.slice),
        "n": list(found.n),
    }


def likeness(adapted: Features, pretrained: Features) -> dict[str, Any]:
    """Linear CKA of the same tokens under two models, on training slices (the only ones that both tile alike)."""
    one, other = (np.isin(f.at, f.places("train")) for f in (adapted, pretrained))
    if not np.array_equal(adapted.where[one], pretrained.where[other]):
        raise InputError(
            f"features of {adapted.name}",
            found="other places than those of the pretrained backbone",
            expected="the same tokens",
            do="Remove scratch/features and run diagnose again.",
        )
    cka = similarity.linear_cka(adapted.tokens[one], pretrained.tokens[other])
    return {"dataset": adapted.name, "cka": _round(cka), "n": int(one.sum())}


def _distance(a: Features, b: Features, level: str, cls: str) -> Distance:
    """Fréchet distance of two datasets as a function of the slices that stand for each."""
    if level == "image":
        xa, xb = a.moments.slice_means(), b.moments.slice_means()
        return lambda i, j: frechet.frechet_samples(xa[i], xb[j])

    def between(i: Numbers, j: Numbers) -> float:
        (_, mean_a, cov_a), (_, mean_b, cov_b) = a.moments.merged(i, cls), b.moments.merged(j, cls)
        return frechet.frechet(mean_a, cov_a, mean_b, cov_b)

    return between


def _each(between: Distance, draws: Sequence[tuple[Numbers, ...]]) -> list[float]:
    """Distances of many draws side by side; LAPACK lets go of Python while it works, and is told not to use threads itself."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda draw: between(draw[0], draw[1]), draws))


def _variance(a: Features, b: Features, level: str, cls: str) -> float:
    """Mean of the two total variances, the unit in which a distance is `relative`."""
    if level == "image":
        return float(np.mean([f.moments.slice_means().var(0, ddof=1).sum() for f in (a, b)]))
    return float(
        np.mean([np.trace(f.moments.merged(np.arange(len(f.slices)), cls)[2]) for f in (a, b)])
    )


def _infinite(between: Distance, every: tuple[Numbers, ...], spec: DiagnoseSettings) -> float:
    """FD-infinity over the number of slices (Chong & Forsyth 2020, with slices instead of independent samples)."""
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
    """95 % basic bootstrap interval over moving blocks of slices; basic, because resampling adds a bias that it takes off."""
    rng = np.random.default_rng(spec.seed)

    def moving_blocks(n: int) -> Numbers:
        length = max(1, n // spec.blocks)
        starts = rng.integers(0, n - length + 1, -(-n // length))
        return np.asarray((starts[:, None] + np.arange(length)).ravel()[:n])

    draws = [tuple(e[moving_blocks(len(e))] for e in every) for _ in range(spec.replicates)]
    low, high = np.percentile(_each(between, draws), [2.5, 97.5])
    return [_round(max(0.0, 2 * found - high)), _round(max(0.0, 2 * found - low))]


def measurable(f: Features, cls: str, spec: DiagnoseSettings) -> bool:
    """Whether a class is in so many slices, and in so many z-blocks, that halves can be compared and a block held out."""
    places = np.unique(_tokens(f, cls)[1])
    return (
        len(places) >= FEWEST and len(np.unique(z_blocks(len(f.slices), spec.blocks)[places])) > 1
    )


def _tokens(f: Features, cls: str) -> tuple[Numbers, Numbers]:
    """Which tokens of the subsample are of a class, and the places of their slices."""
    chosen = np.flatnonzero(np.isin(f.foreground, CLASSES[cls]))
    return chosen, f.at[chosen]


def _places(f: Features, level: str, cls: str) -> Numbers:
    """Places of the slices that have the class; a draw of others alone would have no tokens."""
    if level == "image":
        return np.arange(len(f.slices))
    return np.flatnonzero(f.moments.count[:, CLASSES[cls]].sum(1) > 0)


def _sample(f: Features, level: str, cls: str, most: int, blocks: int, labels: bool = False) -> Any:
    """(n, D) vectors and (n,) z-blocks of a class, thinned evenly to at most `most`; with labels (n,) where asked for.

    Blocks are of the slices that have the class at all: a block of slices without foreground could not be held out.
    """
    if level == "image":
        return f.moments.slice_means().astype(np.float32), z_blocks(len(f.slices), blocks)
    chosen, at = _tokens(f, cls)
    slices, place = np.unique(at, return_inverse=True)
    if len(slices) < (least := blocks if cls == "all" else FEWEST):
        raise InputError(
            f"dataset {f.name}",
            found=f"{cls} tokens in {len(slices)} slices of the subsample",
            expected=f"in at least {least}",
            do="Raise `diagnose.tokens` or `diagnose.slices`.",
        )
    thin = np.linspace(0, len(chosen) - 1, min(most, len(chosen))).round().astype(int)
    block = z_blocks(len(slices), blocks)[place]
    out = f.tokens[chosen[thin]], block[thin]
    return (*out, f.foreground[chosen[thin]]) if labels else out


def _count(f: Features, level: str, cls: str) -> int:
    if level == "image":
        return len(f.slices)
    n = int(f.moments.count[:, CLASSES[cls]].sum())
    if n < 2:
        raise InputError(
            f"dataset {f.name}",
            found=f"no {cls} tokens in {len(f.slices)} slices",
            expected=f"some {cls}",
            do="Check the label rule (`foreground`), or choose more slices (`diagnose.slices`).",
        )
    return n


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")
