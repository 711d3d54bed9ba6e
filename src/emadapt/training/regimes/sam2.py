"""SAM 2, as published."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from emadapt.models.published import WHOLE, Passed
from emadapt.models.sam2 import PromptedSegmenter, Sam2
from emadapt.models.segmenter import Segmenter
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import Sam2Settings
from emadapt.training.regimes.regime import Regime


class Sam2Regime(Regime):
    """Whole slices at their own resolution; nothing is trained."""

    settings: Sam2Settings

    def __init__(self, settings: Sam2Settings, spec: BackboneSettings, head: str) -> None:
        super().__init__(settings, spec.changed(**WHOLE, scale=1.0, tile=0, pixel_nm=0.0), head)

    @cached_property
    def backbone(self) -> Sam2:
        return Sam2(self.settings.weights, self.settings.prompts)

    def adapt(self, backbone: Sam2) -> None:
        backbone.requires_grad_(False)

    def segmenter(self, backbone: Any, n_logits: int) -> Segmenter:
        kind = Segmenter if self.settings.prompts == "automatic" else PromptedSegmenter
        return kind(self.spec, backbone, Passed())
