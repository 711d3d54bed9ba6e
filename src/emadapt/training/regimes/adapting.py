"""Regimes that train a part of the backbone, or nothing of it, and a head."""

from emadapt.models.adapters import add_lora, cut_below, train_all, train_biases, vectors_apart
from emadapt.models.backbones import Backbone
from emadapt.study.regimes import LoraLastKSettings, LowRankSettings
from emadapt.training.regimes.regime import Regime


class Frozen(Regime):
    """Nothing of the backbone is trained, so its tokens come from the cache."""

    cached = True


class Lora(Regime):
    """Low-rank adapters on the attention of every block (Hu et al. 2022, arXiv 2106.09685)."""

    settings: LowRankSettings

    def adapt(self, backbone: Backbone) -> None:
        own = self.settings
        add_lora(backbone, own.rank, own.alpha, own.dropout, self.cut(backbone) or 0)


class LoraLastK(Lora):
    """LoRA in the last `k` of the blocks that run; the output of those below is cached."""

    settings: LoraLastKSettings

    cached = True

    def cut(self, backbone: Backbone) -> int:
        return cut_below(backbone, self.settings.k)


class BitFit(Regime):
    """Biases and LayerNorms, without weight decay (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    groups = staticmethod(vectors_apart)

    def adapt(self, backbone: Backbone) -> None:
        train_biases(backbone)


class Full(Regime):
    """Every weight of the blocks that run."""

    groups = staticmethod(vectors_apart)

    def adapt(self, backbone: Backbone) -> None:
        train_all(backbone)
