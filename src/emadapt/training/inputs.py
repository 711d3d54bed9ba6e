"""What a unit is fitted with: its model, its labelled data, and how far its training is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from emadapt.data.batches import Samples
from emadapt.data.ingest import Volume
from emadapt.data.labelled import Tile, few_slices, few_tiles, with_training
from emadapt.data.splits import starts_in
from emadapt.data.tiles import Geometry
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView
from emadapt.study.datasets import TrainSetSettings
from emadapt.study.study import Unit
from emadapt.study.training import TrainSettings

OnEpoch = Callable[[dict[str, float], int], None]
"""Called with the metrics of an epoch and its number, from 1. What it raises ends the training."""


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
    tiles: list[list[Tile]] = []
    if spec.crops:
        pairs = zip(whole, corners, strict=True)
        tiles = [few_tiles(v, spec, at, seed, _starts(v, depth)) for v, at in pairs]
        volumes = [_with_tiles(v, own, depth) for v, own in zip(whole, tiles, strict=True)]
        n_tiles = sum(map(len, tiles))
    else:
        volumes = [few_slices(volume, spec, seed) for volume in whole]
        n_tiles = _all_tiles(volumes, corners, depth)
    n_slices, all_slices = (sum(len(v.split["train"]) for v in some) for some in (volumes, whole))
    all_tiles = _all_tiles(whole, corners, depth)
    counts = {"slices": (n_slices, all_slices), "crops": (n_tiles, all_tiles)}
    return Labelled(whole, volumes, tiles, counts)


def _starts(volume: Volume, depth: int) -> list[int]:
    """First slices of samples that cover the training slices once."""
    return starts_in(volume.runs("train"), depth, apart=True)


def _with_tiles(volume: Volume, tiles: Sequence[Tile], depth: int) -> Volume:
    """The volume with the slices of its labelled tiles as training slices."""
    return with_training(volume, sorted({z + k for z, _, _ in tiles for k in range(depth)}))


def _all_tiles(
    volumes: Sequence[Volume], corners: Sequence[Sequence[tuple[int, int]]], depth: int
) -> int:
    return sum(len(_starts(v, depth)) * len(at) for v, at in zip(volumes, corners, strict=True))


@dataclass(frozen=True)
class Inputs:
    """A fresh model, and the data that it learns from.

    Attributes:
        segmenter: the model, on the device.
        views: token cache entries of each dataset, the plain one first; empty where images are
            read.
        samples: what is drawn from.
        unlabelled: datasets whose images it sees without labels.
    """

    unit: Unit
    train: TrainSettings
    segmenter: Segmenter
    labelled: Labelled
    views: list[list[TokenView]]
    samples: Samples
    unlabelled: list[Volume] = field(default_factory=list)

    @property
    def volumes(self) -> list[Volume]:
        """Its datasets, with the labelled training slices alone."""
        return self.labelled.volumes

    def view(self, number: int) -> TokenView | None:
        """The cached tokens of dataset `number`; None where there are none."""
        return self.views[number][0] if self.views else None


@dataclass
class Progress:
    """How far training has come; what a checkpoint has besides tensors.

    Attributes:
        epoch: finished epochs.
        best: the best monitored value so far, and `best_epoch` its epoch.
        seconds: of training and validation.
        history: metrics of each epoch.
    """

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
