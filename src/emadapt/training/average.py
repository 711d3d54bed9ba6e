"""A moving average of the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from emadapt.models.adapters import State
from emadapt.models.segmenter import Segmenter


class Average:
    """Exponential moving average (EMA) of the trained weights (Tarvainen & Valpola 2017).

    Args:
        keep: share that it keeps at each step. 0: the weights themselves.
        state: to go on from.
    """

    forgets = True
    """Whether it keeps at most (1 + steps) / (10 + steps), so that it soon forgets initial values.
    """

    def __init__(self, keep: float, state: State) -> None:
        self.keep, self.state = keep, state if keep else {}

    def step(self, segmenter: Segmenter, steps: int) -> None:
        """Take in the weights after `steps` steps."""
        if not self.keep:
            return
        keep = min(self.keep, (1 + steps) / (10 + steps)) if self.forgets else self.keep
        for name, value in segmenter.live_state().items():
            own = self.state[name] = self.state[name].to(value.device)
            if value.is_floating_point():
                own.lerp_(value, 1 - keep)
            else:
                own.copy_(value)

    @contextmanager
    def in_place(self, segmenter: Segmenter) -> Iterator[None]:
        """The average in the place of the weights."""
        if not self.keep:
            yield
            return
        now = {k: v.clone() for k, v in segmenter.live_state().items()}
        segmenter.load_trained(self.state)
        yield
        segmenter.load_trained(now)


def copy_of(segmenter: Segmenter) -> State:
    """The trained tensors, as copies."""
    return {k: v.clone() for k, v in segmenter.trained_state().items()}
