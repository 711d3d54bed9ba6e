"""Which slices, or tiles, of a unit's datasets count as labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emadapt.data.ingest import Volume
from emadapt.data.labelled import Tile, few_slices, few_tiles, with_training
from emadapt.data.splits import starts_in
from emadapt.data.tiles import Geometry
from emadapt.study.datasets import TrainSetSettings


@dataclass(frozen=True)
class Labelled:
    """The datasets of a training set.

    Attributes:
        whole: as ingested.
        volumes: with the labelled training slices alone.
        tiles: the labelled tiles of each, or blocks in 3D; empty where whole slices are labelled.
        counts: labelled ones and all, over the datasets, in `slices` and in tiles (`crops`).
    """

    whole: list[Volume]
    volumes: list[Volume]
    tiles: list[list[Tile]]
    counts: dict[str, tuple[int, int]]


def label(
    whole: list[Volume],
    spec: TrainSetSettings,
    seed: int,
    geometry: Callable[[Volume], Geometry],
    depth: int,
) -> Labelled:
    """The datasets, as far as they count as labelled.

    Args:
        whole: as ingested.
        spec: of the training set.
        seed: of the draw of few labels.
        geometry: of a dataset's training samples.
        depth: slices of a sample.

    Raises:
        InputError: more labels are wanted than there are.
    """
    corners = [geometry(volume).corners(0.0) for volume in whole]
    if spec.crops:
        tiles = [
            few_tiles(v, spec, at, seed, _starts(v, depth))
            for v, at in zip(whole, corners, strict=True)
        ]
        volumes = [_with_tiles(v, own, depth) for v, own in zip(whole, tiles, strict=True)]
        n_tiles = sum(map(len, tiles))
    else:
        tiles, volumes = [], [few_slices(v, spec, seed) for v in whole]
        n_tiles = _all_tiles(volumes, corners, depth)
    n_slices, all_slices = (sum(len(v.split["train"]) for v in some) for some in (volumes, whole))
    counts = {
        "slices": (n_slices, all_slices),
        "crops": (n_tiles, _all_tiles(whole, corners, depth)),
    }
    return Labelled(whole, volumes, tiles, counts)


def _starts(volume: Volume, depth: int) -> list[int]:
    """First slices of samples that cover the training slices once."""
    return starts_in(volume.split["train"], depth, apart=True)


def _with_tiles(volume: Volume, tiles: Sequence[Tile], depth: int) -> Volume:
    """The volume with the slices of its labelled tiles as training slices."""
    return with_training(volume, sorted({z + k for z, _, _ in tiles for k in range(depth)}))


def _all_tiles(
    volumes: Sequence[Volume], corners: Sequence[Sequence[tuple[int, int]]], depth: int
) -> int:
    return sum(len(_starts(v, depth)) * len(at) for v, at in zip(volumes, corners, strict=True))
