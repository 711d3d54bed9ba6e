"""A regime: how a unit's model is built, what it learns from, how it is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emadapt.data.batches import Samples
from emadapt.data.crops import CropDataset
from emadapt.data.ingest import Volume
from emadapt.data.tiles import Geometry, geometry_of
from emadapt.errors import InputError
from emadapt.models.adapters import Groups, one_group
from emadapt.models.backbones import pretrained
from emadapt.models.heads import HEADS
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView, token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import ONE_CLASS
from emadapt.study.regimes import RegimeSettings
from emadapt.study.training import TrainSettings
from emadapt.training.fit import fit
from emadapt.training.inputs import Inputs, Labelled, OnEpoch, Progress
from emadapt.training.objective import Objective
from emadapt.training.samples import TokenDataset
from emadapt.training.self_training import SelfTraining


class Regime:
    """A pretrained backbone and a head of the study's choice, trained in steps on image crops.

    A kind is a subclass that says what it does otherwise.

    Args:
        settings: of the kind.
        spec: of the backbone, and of how slices enter it.
        head: name of the head.
    """

    cached = False
    """Whether it works on what the token cache has."""
    groups: Groups = staticmethod(one_group)
    """An optimiser's groups for what is trained of the backbone."""
    crops: Callable[..., Samples] = CropDataset
    """What training draws from where it does not use the token cache."""

    def __init__(self, settings: RegimeSettings, spec: BackboneSettings, head: str) -> None:
        self.settings, self.spec, self.head_name = settings, spec, head

    @cached_property
    def backbone(self) -> Any:
        """What is in front of the head; its weights are read when a token is first computed."""
        return pretrained(self.spec)

    def build(self, seed: int, classes: tuple[str, ...] = ONE_CLASS) -> Segmenter:
        """A fresh model of these classes, its random values drawn from `seed`.

        Raises:
            InputError: the settings do not suit the backbone, or there is no such head.
        """
        backbone = self.backbone
        torch.manual_seed(seed)
        self.adapt(backbone)
        if getattr(self.settings, "gradient_checkpointing", False):
            backbone.vit.set_grad_checkpointing(True)
        segmenter = self.segmenter(backbone, len(classes) + 1)
        segmenter.classes = classes
        return segmenter

    def adapt(self, backbone: Any) -> None:
        """Make what is trained of the backbone trainable, in place; nothing by default."""

    def segmenter(self, backbone: Any, n_logits: int) -> Segmenter:
        """The adapted backbone with a new head."""
        return Segmenter(self.spec, backbone, self.head(backbone, n_logits), self.cut(backbone))

    def head(self, backbone: Any, n_logits: int) -> nn.Module:
        """A new head."""
        if self.head_name not in HEADS:
            what, names = f"head {self.head_name!r}", ", ".join(HEADS)
            raise InputError(what, found="an unknown head", expected=names, do="Correct `head`.")
        return HEADS[self.head_name](backbone.arch.dim, len(backbone.blocks), n_logits)

    def cut(self, backbone: Any) -> int | None:
        """Blocks below the first adapted one, where the cache ends; None: the cache has all."""
        return None

    def check(self, volumes: Sequence[Volume], train: TrainSettings) -> None:
        """Raise InputError for data or settings that it cannot be trained with."""

    def trains_from_cache(self, train: TrainSettings, few_tiles: bool) -> bool:
        """Whether it is trained on cached tokens. Few labelled tiles are not in cached crops."""
        return self.cached and train.cached and not few_tiles

    def geometry(self, volume: Volume) -> Geometry:
        """How slices of a dataset are cut into training samples."""
        return geometry_of(volume, self.spec, self.backbone.arch.patch)

    def views(
        self, segmenter: Segmenter, labelled: Labelled, train: TrainSettings
    ) -> list[list[TokenView]]:
        """Cache entries of each dataset, the plain one first, with its labelled rows."""
        augmented = self.spec.views if train.augment and not labelled.tiles else 0
        found = []
        for number, whole in enumerate(labelled.whole):
            own = token_views(
                segmenter.backbone, self.spec, whole, range(augmented + 1), cut=segmenter.cut
            )
            only = frozenset(labelled.tiles[number]) if labelled.tiles else None
            split = labelled.volumes[number].split
            found.append([dataclasses.replace(view, split=split, only=only) for view in own])
        return found

    def samples(
        self,
        segmenter: Segmenter,
        labelled: Labelled,
        views: list[list[TokenView]],
        unlabelled: Sequence[Volume],
        train: TrainSettings,
    ) -> Samples:
        """What training draws from: the token cache where there are `views`, else image crops."""
        if views:
            others = Labelled(list(unlabelled), list(unlabelled), [], {})
            return TokenDataset(views, self.views(segmenter, others, train))
        tiles, patch = labelled.tiles, segmenter.patch
        return self.crops(labelled.volumes, self.spec, patch, train.augment, tiles, unlabelled)

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        """Fit the model of `inputs`, from the checkpoint in `scratch` on if there is one.

        It leaves the best weights in the model.
        """
        if not self.settings.trains:
            return Progress()
        settings: Any = self.settings
        make: Any = partial(SelfTraining, settings) if inputs.unlabelled else Objective
        return fit(inputs, scratch, on_epoch, self.groups, make)
