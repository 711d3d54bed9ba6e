"""Low-rank adapters in every block."""

from emadapt.models.adapters import add_lora
from emadapt.models.backbones import Backbone
from emadapt.study.regimes import LowRankSettings
from emadapt.training.regimes.regime import Regime


class Lora(Regime):
    """Low-rank adapters on the attention of every block (Hu et al. 2022, arXiv 2106.09685)."""

    settings: LowRankSettings

    def adapt(self, backbone: Backbone) -> None:
        own = self.settings
        add_lora(backbone, own.rank, own.alpha, own.dropout, self.cut(backbone) or 0)
