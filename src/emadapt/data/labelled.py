"""Few labels: which training slices, or tiles of them, count as labelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from emadapt.data.ingest import Volume
from emadapt.errors import InputError
from emadapt.study.datasets import TrainSetSettings

Tile = tuple[int, int, int]
"""Slice (the first of a 3D patch), and upper left corner (y, x) in the padded slice."""


def choose(total: int, n: int, seed: int) -> list[int]:
    """`n` of `total` places, ascending: one drawn from each of n stretches of equal length."""
    rng = np.random.default_rng([seed, n])
    edges = [total * i // n for i in range(n + 1)]
    return [int(rng.integers(low, high)) for low, high in pairwise(edges)]


def amount(wanted: int | str, total: int, what: str) -> int:
    """How many `wanted` means: itself, `25%` of the total but at least one, or all for 0."""
    if isinstance(wanted, str):
        return max(1, round(total * float(wanted.rstrip("%")) / 100))
    if wanted > total:
        expected = f"at most {total}, which the training part has"
        raise InputError(what, found=str(wanted), expected=expected, do="Lower it.")
    return wanted or total


def few_slices(volume: Volume, spec: TrainSetSettings, seed: int) -> Volume:
    """The volume with the labelled slices alone as its training part.

    Of images so many a class, of many volumes so many of them.
    """
    slices, wanted = volume.split["train"], spec.slices_of(volume.name)
    what = f"slices of a training set with {volume.name}"
    if volume.whole_images:
        return with_training(volume, sorted(_of_each_class(volume, wanted, seed, what)))
    if volume.of_volumes:
        parts = volume.by_part(slices)
        n = amount(wanted, len(parts), f"volumes of a training set with {volume.name}")
        return with_training(volume, [z for k in choose(len(parts), n, seed) for z in parts[k]])
    n = amount(wanted, len(slices), what)
    return with_training(volume, [slices[i] for i in choose(len(slices), n, seed)])


def _of_each_class(volume: Volume, wanted: int | str, seed: int, what: str) -> Iterator[int]:
    """Training images drawn by the seed; a smaller number draws some of the same."""
    for kind, name in enumerate(volume.classes):
        own = [n for n in volume.split["train"] if volume.label[n] == kind]
        shuffled = np.random.default_rng([seed, kind]).permutation(own)
        yield from map(int, shuffled[: amount(wanted, len(own), f"{what}, class {name}")])


def few_tiles(
    volume: Volume,
    spec: TrainSetSettings,
    corners: Sequence[tuple[int, int]],
    seed: int,
    starts: Sequence[int],
) -> list[Tile]:
    """The labelled tiles, drawn evenly from those at `corners` of slices or patches at `starts`."""
    tiles = [(z, y, x) for z in starts for y, x in corners]
    n = amount(spec.crops, len(tiles), f"crops of a training set with {volume.name}")
    return [tiles[i] for i in choose(len(tiles), n, seed)]


def with_training(volume: Volume, slices: Sequence[int]) -> Volume:
    """The volume with other labelled training slices; its `training_images` stay."""
    manifest = {
        **volume.manifest,
        "training_images": volume.training_images,
        "split": {**volume.split, "train": list(slices)},
    }
    return dataclasses.replace(volume, manifest=manifest)
