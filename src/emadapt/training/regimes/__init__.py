"""Regimes. A new kind is a class here, its settings in `study`, and an entry in `REGIMES`."""

from __future__ import annotations

from emadapt.study.study import Study, Unit
from emadapt.training.regimes.adapting import BitFit, Frozen, Full, Lora, LoraLastK
from emadapt.training.regimes.at_once import Knn, Ridge
from emadapt.training.regimes.regime import Regime
from emadapt.training.regimes.systems import MitoNetRegime, Sam2Regime
from emadapt.training.regimes.unets import ResUNet3dRegime, UNet2dRegime

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
    return REGIMES[settings.kind](settings, spec, study.head_of(unit.regime))
