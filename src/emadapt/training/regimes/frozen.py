"""A head on the tokens of the frozen backbone."""

from emadapt.training.regimes.regime import Regime


class Frozen(Regime):
    """Nothing of the backbone is trained, so its tokens come from the cache."""

    cached = True
