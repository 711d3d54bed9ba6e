"""Ridge regression on cached tokens; its strength is chosen on validation slices."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import cast

from emadapt.models.heads import Linear
from emadapt.models.ridge import STRENGTHS, Solutions, Sums, solve, sums_of
from emadapt.models.tokens import TokenView
from emadapt.study.training import TrainSettings
from emadapt.training.at_once import batches, choose, report, tokens_and_classes
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.regime import Regime


class Ridge(Regime):
    """Solves for a linear head on all cached views of the training slices."""

    cached = True

    def trains_from_cache(self, train: TrainSettings, few_tiles: bool) -> bool:
        return True

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        started = time.perf_counter()
        path = ridge_path(inputs.views, balanced=inputs.train.sampling == "balanced")
        choice = choose(inputs, path.predict)
        head = cast(Linear, inputs.segmenter.head)
        path.write(head, choice.i, choice.threshold, choice.slope)
        return report(choice, "ridge/strength", path.strengths, started, on_epoch)


def ridge_path(views: Sequence[Sequence[TokenView]], *, balanced: bool) -> Solutions:
    """Solutions of all strengths. Balanced, datasets weigh the same whatever their size."""
    each = [reduce(add, (part for view in own for part in _sums(view))) for own in views]
    if balanced:
        each = [sums.weighted(1 / sums.n) for sums in each]
    return solve(reduce(add, each), STRENGTHS)


def _sums(view: TokenView) -> Iterator[Sums]:
    """Of a view's training rows, some at a time."""
    for rows in batches(view.rows_of("train")):
        yield sums_of(*tokens_and_classes(view, rows))
