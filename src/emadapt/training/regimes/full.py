"""The whole backbone."""

from emadapt.models.adapters import train_all, vectors_apart
from emadapt.models.backbones import Backbone
from emadapt.training.regimes.regime import Regime


class Full(Regime):
    """Every weight of the blocks that run."""

    groups = staticmethod(vectors_apart)

    def adapt(self, backbone: Backbone) -> None:
        train_all(backbone)
