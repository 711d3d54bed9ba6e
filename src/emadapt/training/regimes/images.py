"""Regimes for whole images: the same adapters, on images with a class each."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from emadapt.data.image_samples import ImageDataset
from emadapt.data.ingest import Volume
from emadapt.errors import InputError
from emadapt.models.backbones import Backbone, Pooled, pretrained
from emadapt.models.classifier import HEADS, Classifier
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import RegimeSettings
from emadapt.study.training import TrainSettings
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.at_once import AtOnce
from emadapt.training.regimes.bitfit import BitFit
from emadapt.training.regimes.full import Full
from emadapt.training.regimes.lora import Lora
from emadapt.training.regimes.regime import Regime
from emadapt.training.validate import validate

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties of logistic regression that are tried."""

Array = npt.NDArray[Any]


class OfImages(Regime):
    """What they share; the kind of regime is the next base class."""

    crops = ImageDataset

    def __init__(self, settings: RegimeSettings, spec: BackboneSettings, head: str) -> None:
        super().__init__(settings, spec.of_images(), head)

    @cached_property
    def backbone(self) -> Backbone:
        return pretrained(self.spec, Pooled)

    def segmenter(self, backbone: Any, n_logits: int) -> Classifier:
        return Classifier(self.spec, backbone, self.head(backbone, n_logits))

    def head(self, backbone: Any, n_logits: int) -> nn.Module:
        width, *_ = backbone.shape_of(len(backbone.blocks), (1, 1))
        return HEADS[self.head_name](width, n_logits - 1)  # none is the background

    def check(self, volumes: Sequence[Volume], train: TrainSettings) -> None:
        check_classes(volumes, volumes[0].classes, f"those of {volumes[0].name}")


class AtOnceImages(AtOnce, OfImages):
    """Fitted at once on cached vectors; several candidates are judged on validation images."""

    def candidates(self, head: Any, vectors: Array, classes: Array) -> Iterator[dict[str, float]]:
        """Fit the head in one way after another to vectors (n, width) and classes (n,)."""
        raise NotImplementedError

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        started, head, best = time.perf_counter(), inputs.segmenter.head, -1.0
        places = [(own[0], int(k)) for own in inputs.views for k in own[0].rows_of("train")]
        vectors = np.stack([view.tokens[k].ravel() for view, k in places]).astype(np.float32)
        classes = np.array([int(view.labels[k].item()) for view, k in places])
        progress = Progress()
        for metrics in self.candidates(head, vectors, classes):
            scored = validate(inputs, every=0)["auroc"]
            progress.history.append({"val/auroc": scored, **metrics})
            progress.epoch += 1
            on_epoch(progress.history[-1], progress.epoch)
            if scored > best:
                best, state = scored, copy.deepcopy(head.state_dict())
                progress.best, progress.best_epoch = scored, progress.epoch - 1
        head.load_state_dict(state)
        progress.seconds = time.perf_counter() - started
        return progress


class FrozenImages(AtOnceImages):
    """A linear probe: logistic regression on standardised vectors, its strength by validation."""

    def candidates(self, head: Any, vectors: Array, classes: Array) -> Iterator[dict[str, float]]:
        from sklearn.linear_model import LogisticRegression

        mean, std = vectors.mean(0), vectors.std(0) + 1e-6
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=500)
            model.fit((vectors - mean) / std, classes)
            weight, bias = model.coef_ / std, model.intercept_
            if len(weight) == 1:  # of two classes: the logit of the second
                weight, bias = np.concatenate([0 * weight, weight]), np.append(0 * bias, bias)
            head.classify.weight.data.copy_(torch.from_numpy(weight))
            head.classify.bias.data.copy_(torch.from_numpy(bias - weight @ mean))
            yield {"probe/strength": strength}


class KnnImages(AtOnceImages):
    """Votes of the nearest training images."""

    def candidates(self, head: Any, vectors: Array, classes: Array) -> Iterator[dict[str, float]]:
        head.fill(torch.from_numpy(vectors), torch.from_numpy(classes))
        yield {}


class LoraImages(OfImages, Lora):
    """Low-rank adapters, trained by images."""


class BitFitImages(OfImages, BitFit):
    """Biases and LayerNorms, trained by images."""


class FullImages(OfImages, Full):
    """The whole backbone, trained by images."""


IMAGE_REGIMES: dict[str, type[OfImages]] = {
    "frozen": FrozenImages,
    "lora": LoraImages,
    "bitfit": BitFitImages,
    "full": FullImages,
    "knn": KnnImages,
}
"""By the `kind` of a regime's settings."""


def check_classes(volumes: Sequence[Volume], classes: tuple[str, ...], whose: str) -> None:
    """Raise InputError for datasets of other classes; `whose` says what has these."""
    for volume in volumes:
        if volume.classes != classes:
            raise InputError(
                f"dataset {volume.name}",
                found=f"classes {', '.join(volume.classes)}",
                expected=f"{', '.join(classes)}, {whose}",
                do="Take datasets of the same classes.",
            )
