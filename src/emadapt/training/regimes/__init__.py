"""Regimes. A new kind is a file here, its settings in `study`, and an entry in `REGIMES`."""

from __future__ import annotations

from emadapt.study.study import Study, Unit
from emadapt.training.regimes.bitfit import BitFit
from emadapt.training.regimes.frozen import Frozen
from emadapt.training.regimes.full import Full
from emadapt.training.regimes.images import IMAGE_REGIMES
from emadapt.training.regimes.knn import Knn
from emadapt.training.regimes.lora import Lora
from emadapt.training.regimes.lora_last_k import LoraLastK
from emadapt.training.regimes.mitonet import MitoNetRegime
from emadapt.training.regimes.regime import Regime
from emadapt.training.regimes.resunet3d import ResUNet3dRegime
from emadapt.training.regimes.ridge import Ridge
from emadapt.training.regimes.sam2 import Sam2Regime
from emadapt.training.regimes.unet2d import UNet2dRegime

REGIMES: dict[str, type[Regime]] = {
    "frozen": Frozen,
    "lora": Lora,
    "lora_last_k": LoraLastK,
    "bitfit": BitFit,
    "full": Full,
    "ridge": Ridge,
    "knn": Knn,
    "unet2d": UNet2dRegime,
    "resunet3d": ResUNet3dRegime,
    "mitonet": MitoNetRegime,
    "sam2": Sam2Regime,
}
"""By the `kind` of a regime's settings."""


def regime_of(study: Study, unit: Unit) -> Regime:
    """The regime of a unit."""
    settings = study.regime_settings[unit.regime]
    spec = study.backbone_settings[unit.backbone]
    kinds = IMAGE_REGIMES if study.classifies else REGIMES
    return kinds[settings.kind](settings, spec, study.head_of(unit.regime))
