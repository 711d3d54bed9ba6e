"""What a unit is fitted with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from emadapt.data.batches import Samples
from emadapt.data.ingest import Volume
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView
from emadapt.study.study import Unit
from emadapt.study.training import TrainSettings
from emadapt.training.labelled import Labelled

OnEpoch = Callable[[dict[str, float], int], None]
"""Called with the metrics of an epoch and its number, from 1. What it raises ends the training."""


@dataclass(frozen=True)
class Inputs:
    """A fresh model, and the data that it learns from.

    Attributes:
        unit: names and seeds it.
        train: its settings.
        segmenter: the model, on the device.
        labelled: its datasets.
        views: token cache entries of each of them, the plain one first; empty where images are
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
        peak_mb: largest memory of the process that trained; 0: ask this process.
    """

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0
