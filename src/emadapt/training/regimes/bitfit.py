"""Biases and LayerNorms of the backbone."""

from emadapt.models.adapters import train_biases, vectors_apart
from emadapt.models.backbones import Backbone
from emadapt.training.regimes.regime import Regime


class BitFit(Regime):
    """Biases and LayerNorms, without weight decay (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    groups = staticmethod(vectors_apart)

    def adapt(self, backbone: Backbone) -> None:
        train_biases(backbone)
