"""Low-rank adapters in the last blocks only; the blocks below them are cached."""

from emadapt.models.adapters import cut_below
from emadapt.models.backbones import Backbone
from emadapt.study.regimes import LoraLastKSettings
from emadapt.training.regimes.lora import Lora


class LoraLastK(Lora):
    """LoRA in the last `k` of the blocks that run."""

    settings: LoraLastKSettings

    cached = True

    def cut(self, backbone: Backbone) -> int:
        return cut_below(backbone, self.settings.k)
