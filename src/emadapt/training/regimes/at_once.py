"""What ridge regression and nearest neighbours share: they are fitted at once on cached tokens.

Both give a map of scores for each class (near 1 where patches are of it) under several candidates:
strengths, or numbers of neighbours. All candidates and all thresholds are judged at once, on
validation slices alone, from histograms of the maps. At the best threshold the odds of a class
against the background are even, and their slope around it is the one of least log loss.

A patch is foreground where at least half of its pixels are. Targets that keep the share of those
pixels gave ridge less on the validation slices of Lucchi and VNC (by 0.003 and 0.006), and kNN more
on one and less on the other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from emadapt.data.foreground import IGNORE, masks_of, patch_classes
from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry_of, merge_tiles, to_native
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView
from emadapt.study.training import TrainSettings
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.regime import Regime

Scores = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (B, D, h, w) to candidate maps (candidates, classes, B, h, w)."""
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

    The log odds of a class against the background are slope * (score - threshold), both (classes,).
    `table` (candidates, 2) has the best validation IoU of each candidate, a class against the rest,
    and its threshold, as means over classes.
    """

    i: int
    thresholds: npt.NDArray[np.float64]
    slopes: npt.NDArray[np.float64]
    table: npt.NDArray[np.float64]


def choose(inputs: Inputs, scores: Scores) -> Choice:
    """The candidate, thresholds and slopes that suit the validation slices best."""
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
    """The candidate and thresholds of the best validation IoU, the mean over datasets and classes.

    Thresholds are above 0, the score of a class that no patch in training is of: nothing is of it.

    Args:
        counts: (datasets, candidates, classes, 2, bins) pixels by score, of the rest and of a
            class.
    """
    above = counts[..., ::-1].cumsum(-1)[..., ::-1]  # pixels from a bin's lower edge on
    hits, predicted = above[..., 1, :], above.sum(-2)
    union = predicted + counts[..., 1, :].sum(-1, keepdims=True) - hits
    iou = np.where(union > 0, hits / np.maximum(union, 1), 1.0).mean(0)  # candidates, classes, bins
    iou = np.where(EDGES[:-1] > 0, iou, -1.0)
    thresholds = EDGES[np.apply_along_axis(_best_bin, -1, iou)]  # candidates, classes
    table = np.stack([iou.max(-1).mean(-1), thresholds.mean(-1)], 1)
    i = int(table[:, 0].argmax())
    classes = zip(np.moveaxis(counts[:, i], 1, 0), thresholds[i], strict=True)
    slopes = np.array([_slope(own, threshold) for own, threshold in classes])
    return Choice(i, thresholds[i], slopes, table)


def tokens_and_classes(
    view: TokenView, rows: Rows
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Tokens (n, D) of some rows, and the class id of each token's patch (n,).

    Without those of which too little is known.
    """
    tokens, labels = np.array(view.tokens[rows]), np.asarray(view.labels[rows])
    n, _, h, w = tokens.shape
    patches = labels.reshape(n, h, labels.shape[1] // h, w, labels.shape[2] // w)
    ids = patch_classes(patches, (2, 4)).ravel()
    flat, known = np.moveaxis(tokens, 1, -1).reshape(n * h * w, -1), ~np.isnan(ids)
    return flat[known], ids[known]


def batches(rows: Rows) -> list[Rows]:
    """Some rows at a time."""
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def _slope(counts: npt.NDArray[np.float64], threshold: float) -> float:
    """The slope of least log loss, of counts (datasets, 2, bins); datasets weigh the same."""
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
    """(candidates, classes, 2, bins) pixels of the rest and of a class by their score."""
    geo = geometry_of(volume, segmenter.spec, segmenter.patch)
    device, limits, n = segmenter.device, (EDGES[0], EDGES[-1]), len(segmenter.classes)
    total: list[npt.NDArray[np.float64]] = []
    for z in volume.split["val"]:
        rows, label = view.rows_of_slice(z), np.asarray(volume.label[z])
        masks, known = masks_of(label, n).reshape(n, *label.shape), label != IGNORE
        corners = [(int(y), int(x)) for _, y, x in view.index[rows]]
        tokens = (torch.from_numpy(np.array(view.tokens[some])) for some in batches(rows))
        found = torch.cat([scores(some.to(device)) for some in tokens], 2)
        per_slice = []
        # One map at a time: all of them at full resolution would not fit.
        for coarse, mask in zip(found.flatten(0, 1), itertools.cycle(masks)):
            maps = F.interpolate(coarse[:, None].float(), geo.tile, mode="bilinear")[:, 0]
            merged = merge_tiles(maps.cpu().numpy(), corners, geo)
            score = np.clip(to_native(merged, geo), *limits)
            both = (score[known & ~mask], score[mask])
            per_slice.append([np.histogram(s, len(EDGES) - 1, limits)[0] for s in both])
        total.append(np.asarray(per_slice, np.float64))
    return np.sum(total, 0).reshape(-1, n, 2, len(EDGES) - 1)


def _best_bin(iou: npt.NDArray[np.float64]) -> int:
    """The middle one of those with the best IoU."""
    places = np.flatnonzero(iou >= iou.max() - 1e-12)
    return int(places[len(places) // 2])
