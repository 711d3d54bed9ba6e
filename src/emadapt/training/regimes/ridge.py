"""Ridge regression on cached tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import cast

import numpy as np

from emadapt.models.heads import Linear
from emadapt.models.ridge import STRENGTHS, Solutions, Sums, solve, sums_of
from emadapt.models.tokens import TokenView
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.at_once import AtOnce, batches, choose, report, tokens_and_classes


class Ridge(AtOnce):
    """Solves for a linear head on all cached views of the training slices."""

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        started = time.perf_counter()
        balanced, classes = inputs.train.sampling == "balanced", len(inputs.segmenter.classes)
        path = ridge_path(inputs.views, balanced=balanced, classes=classes)
        choice = choose(inputs, path.predict)
        head = cast(Linear, inputs.segmenter.head)
        path.write(head, choice.i, choice.thresholds, choice.slopes)
        return report(choice, "ridge/strength", path.strengths, started, on_epoch)


def ridge_path(
    views: Sequence[Sequence[TokenView]], *, balanced: bool, classes: int = 1
) -> Solutions:
    """Solutions of all strengths; a target is 1 where a token is of its class, else 0.

    Balanced, datasets weigh the same whatever their size.
    """
    each: list[Sums] = []
    for own in views:
        parts = [(view, rows) for view in own for rows in batches(view.rows_of("train"))]
        pairs = (tokens_and_classes(*part) for part in parts)
        targets = ((tokens, ids[:, None] == np.arange(1, classes + 1)) for tokens, ids in pairs)
        each.append(reduce(add, (sums_of(*pair) for pair in targets)))
    if balanced:
        each = [sums.weighted(1 / sums.n) for sums in each]
    return solve(reduce(add, each), STRENGTHS)
