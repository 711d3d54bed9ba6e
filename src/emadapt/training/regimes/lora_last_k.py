"""Low-rank adapters in the last blocks only."""

from emadapt.models.adapters import cut_below
from emadapt.models.backbones import Backbone
from emadapt.study.regimes import LoraLastKSettings
from emadapt.training.regimes.lora import Lora


class LoraLastK(Lora):
    """LoRA in the last `k` of the blocks that run; the output of those below is cached."""

    settings: LoraLastKSettings

    cached = True

    def cut(self, backbone: Backbone) -> int:
        return cut_below(backbone, self.settings.k)
