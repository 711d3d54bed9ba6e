"""Published systems: MitoNet, as published or fine-tuned, and SAM 2."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from emadapt.models.mitonet import TILE, MitoNet
from emadapt.models.published import Passed
from emadapt.models.sam2 import PromptedSegmenter, Sam2
from emadapt.models.segmenter import Segmenter
from emadapt.models.unet2d import rounded_up
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import MitoNetSettings, Sam2Settings
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.regime import Regime

WHOLE = {"context": 0, "views": 0, "longest_edge": 0}
"""Settings of a backbone for slices as the systems take them."""


class MitoNetRegime(Regime):
    """Whole slices, downsampled by `factor`; while all of the network is trained, tiles."""

    settings: MitoNetSettings

    def __init__(self, settings: MitoNetSettings, spec: BackboneSettings, head: str) -> None:
        tile = rounded_up(spec.tile, TILE) if settings.finetune else 0
        own = spec.changed(**WHOLE, scale=1 / settings.factor, tile=tile)
        super().__init__(settings, own, head)

    @cached_property
    def backbone(self) -> MitoNet:
        return MitoNet(Path(self.settings.weights))

    def adapt(self, backbone: MitoNet) -> None:
        backbone.requires_grad_(self.settings.finetune)

    def head(self, backbone: Any) -> Passed:
        return Passed()

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        return super().fit(inputs, scratch, on_epoch) if self.settings.finetune else Progress()


class Sam2Regime(Regime):
    """Whole slices at their own resolution; nothing is trained."""

    settings: Sam2Settings

    def __init__(self, settings: Sam2Settings, spec: BackboneSettings, head: str) -> None:
        super().__init__(settings, spec.changed(**WHOLE, scale=1.0, tile=0), head)

    @cached_property
    def backbone(self) -> Sam2:
        return Sam2(self.settings.weights, self.settings.prompts)

    def adapt(self, backbone: Sam2) -> None:
        backbone.requires_grad_(False)

    def segmenter(self, backbone: Any) -> Segmenter:
        kind = Segmenter if self.settings.prompts == "automatic" else PromptedSegmenter
        return kind(self.spec, backbone, Passed())

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        return Progress()
