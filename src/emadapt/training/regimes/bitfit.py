"""Biases and LayerNorms of the backbone (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from emadapt.models.adapters import train_biases, vectors_apart
from emadapt.models.backbones import Backbone
from emadapt.study.regimes import BitFitSettings
from emadapt.training.regimes.regime import Regime


class BitFit(Regime):
    """Vectors of the backbone are trained, without weight decay."""

    settings: BitFitSettings

    groups = staticmethod(vectors_apart)

    def adapt(self, backbone: Backbone) -> None:
        train_biases(backbone)
        if self.settings.gradient_checkpointing:
            backbone.vit.set_grad_checkpointing(True)
