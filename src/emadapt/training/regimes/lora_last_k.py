"""Low-rank adapters in the last blocks only."""

from emadapt.models.adapters import cut_below
from emadapt.models.backbones import Backbone
from emadapt.study.regimes import LoraLastKSettings
from emadapt.study.training import TrainSettings
from emadapt.training.regimes.lora import Lora


class LoraLastK(Lora):
    """LoRA in the last `k` of the blocks that run; the output of those below is cached."""

    settings: LoraLastKSettings

    cached = True

    def trains_from_cache(self, train: TrainSettings, few_tiles: bool) -> bool:
        """Not with self-training, which hides blocks of the image itself."""
        return not self.settings.self_training and super().trains_from_cache(train, few_tiles)

    def cut(self, backbone: Backbone) -> int:
        return cut_below(backbone, self.settings.k)
