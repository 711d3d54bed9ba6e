"""What ridge regression and nearest neighbours share: they are fitted at once on cached tokens.

Both give a map of scores (near 1 where patches are foreground) under several candidates: strengths,
or numbers of neighbours. All candidates and all thresholds are judged at once, on validation slices
alone, from histograms of the maps. The best threshold becomes 0.5 of the probability, and the slope
of the probability around it is the one of least log loss.

A patch is foreground where at least half of its pixels are. Targets that keep the share of those
pixels gave ridge less on the validation slices of Lucchi and VNC (by 0.003 and 0.006), and kNN more
on one and less on the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry_of, merge_tiles, to_native
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import OCCUPANCY, TokenView, occupancy
from emadapt.study.training import TrainSettings
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.regime import Regime

Scores = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (B, D, h, w) to candidate maps (candidates, B, h, w)."""
Rows = npt.NDArray[np.int64]

ROWS = 16  # tiles in memory at once
EDGES = np.linspace(-0.5, 1.5, 401)
"""Of the bins of scores; what is beyond counts to the outermost."""


class AtOnce(Regime):
    """It has nothing but cached tokens to learn from."""

    cached = True

    def trains_from_cache(self, train: TrainSettings, few_tiles: bool) -> bool:
        return True


@dataclass(frozen=True)
class Choice:
    """The best candidate `i` on validation.

    The probability is the logistic function of slope * (score - threshold). `table` (candidates, 2)
    has the best validation IoU of each candidate, and its threshold.
    """

    i: int
    threshold: float
    slope: float
    table: npt.NDArray[np.float64]


def choose(inputs: Inputs, scores: Scores) -> Choice:
    """The candidate, threshold and slope that suit the validation slices best."""
    views = zip(inputs.volumes, inputs.views, strict=True)
    return best_of(np.stack([_counts(scores, inputs.segmenter, v, own[0]) for v, own in views]))


def report(
    choice: Choice, name: str, values: Sequence[float], started: float, on_epoch: OnEpoch
) -> Progress:
    """The candidates in the place of epochs; `name` is what their values are called.

    `started` is time.perf_counter() at the start of the fit.
    """
    history = [
        {"val/iou": float(iou), name: float(value), "threshold": float(threshold)}
        for (iou, threshold), value in zip(choice.table, values, strict=True)
    ]
    for number, metrics in enumerate(history, 1):
        on_epoch(metrics, number)
    seconds = time.perf_counter() - started
    return Progress(len(history), history[choice.i]["val/iou"], choice.i, seconds, history)


def best_of(counts: npt.NDArray[np.float64]) -> Choice:
    """The candidate and threshold of the best validation IoU, the mean over datasets.

    Args:
        counts: (datasets, candidates, 2, bins) pixels of background and foreground by score.
    """
    above = counts[..., ::-1].cumsum(-1)[..., ::-1]  # pixels from a bin's lower edge on
    hits, predicted, labelled = above[:, :, 1], above.sum(2), counts[:, :, 1].sum(-1, keepdims=True)
    union = predicted + labelled - hits
    iou = np.where(union > 0, hits / np.maximum(union, 1), 1.0).mean(0)  # candidates, bins
    best = iou.max(1)
    i = int(best.argmax())
    bins = [_middle(np.flatnonzero(row >= top - 1e-12)) for row, top in zip(iou, best, strict=True)]
    threshold = float(EDGES[bins[i]])
    table = np.stack([best, EDGES[bins]], 1)
    return Choice(i, threshold, _slope(counts[:, i], threshold), table)


def tokens_and_classes(
    view: TokenView, rows: Rows
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Tokens (n, D) of some rows, and whether each token's patch is foreground (n,), 0 or 1.

    Without those of which too little is known.
    """
    tokens, labels = np.array(view.tokens[rows]), np.asarray(view.labels[rows])
    n, _, h, w = tokens.shape
    patches = labels.reshape(n, h, labels.shape[1] // h, w, labels.shape[2] // w)
    occupied = occupancy(patches, (2, 4)).ravel()
    flat, known = np.moveaxis(tokens, 1, -1).reshape(n * h * w, -1), ~np.isnan(occupied)
    return flat[known], (occupied[known] >= OCCUPANCY).astype(np.float32)


def batches(rows: Rows) -> list[Rows]:
    """Some rows at a time."""
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def _slope(counts: npt.NDArray[np.float64], threshold: float) -> float:
    """The slope of least log loss; datasets weigh the same."""
    from scipy.optimize import minimize_scalar

    middles = (EDGES[1:] + EDGES[:-1]) / 2 - threshold
    weights = (counts / counts.sum((1, 2), keepdims=True)).sum(0)

    def loss(log_slope: float) -> float:
        z = np.exp(log_slope) * middles
        return float(weights[0] @ np.logaddexp(0, z) + weights[1] @ np.logaddexp(0, -z))

    return float(np.exp(minimize_scalar(loss, bounds=(0.0, np.log(100.0)), method="bounded").x))


@torch.inference_mode()
def _counts(
    scores: Scores, segmenter: Segmenter, volume: Volume, view: TokenView
) -> npt.NDArray[np.float64]:
    """(candidates, 2, bins) pixels of background and foreground by their score."""
    geo = geometry_of(volume, segmenter.spec, segmenter.patch)
    device, limits = segmenter.device, (EDGES[0], EDGES[-1])
    total: list[npt.NDArray[np.float64]] = []
    for z in volume.split["val"]:
        rows, (label, known) = view.rows_of_slice(z), volume.truth(z)
        corners = [(int(y), int(x)) for _, y, x in view.index[rows]]
        tokens = (torch.from_numpy(np.array(view.tokens[some])) for some in batches(rows))
        found = torch.cat([scores(some.to(device)) for some in tokens], 1)
        per_slice = []
        for coarse in found:  # one candidate at a time: all maps at full resolution would not fit
            maps = F.interpolate(coarse[:, None].float(), geo.tile, mode="bilinear")[:, 0]
            merged = merge_tiles(maps.cpu().numpy(), corners, geo)
            score = np.clip(to_native(merged, geo), *limits)
            classes = (score[known & ~label], score[label])
            per_slice.append([np.histogram(s, len(EDGES) - 1, limits)[0] for s in classes])
        total.append(np.asarray(per_slice, np.float64))
    return np.asarray(np.sum(total, 0))


def _middle(places: Rows) -> int:
    return int(places[len(places) // 2])
