"""Regimes without gradients: ridge and kNN on cached tokens. What they leave open is chosen on validation slices alone.

Both give a map of scores (near 1 where patches are foreground), which interpolated and cut at a threshold is a segmentation. All
candidates (strengths of ridge, k of kNN) and all thresholds are judged at once from histograms of the maps; the best threshold
becomes 0.5 of the probability, and the slope of the probability around it is the one of least log loss.

A patch is foreground where at least half of its pixels are, as in diagnostics. Targets that keep the share of those pixels gave
ridge less on the validation slices of Lucchi and VNC (by 0.003 and 0.006), and kNN more on one and less on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from emadapt.data.ingest import Volume
from emadapt.data.tiles import blend, geometry_of
from emadapt.domains.features import OCCUPANCY
from emadapt.models.heads import Linear
from emadapt.models.nearest import Nearest
from emadapt.models.ridge import STRENGTHS, Solutions, Sums, solve, sums_of
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView
from emadapt.study.study import TrainSettings

Views = Sequence[Sequence[TokenView]]
Scores = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (B, D, h, w) to candidate maps (candidates, B, h, w)."""
History = list[dict[str, float]]

BANK = 10_000
"""Training tokens that kNN compares with."""
KS = (3, 5, 10, 20, 40)
ROWS = 16  # tiles in memory at once
EDGES = np.linspace(-0.5, 1.5, 401)
"""Of the bins of scores; what lies outside counts to the outermost."""


@dataclass(frozen=True)
class Choice:
    """The best on validation.

    Attributes:
        i: number of the candidate.
        threshold: the score above which a pixel is foreground.
        slope: the probability is the logistic function of slope * (score - threshold).
        table: (candidates, 2) best validation IoU of each, and its threshold.
    """

    i: int
    threshold: float
    slope: float
    table: npt.NDArray[np.float64]


def fit_ridge(
    segmenter: Segmenter, volumes: Sequence[Volume], views: Views, train: TrainSettings, seed: int
) -> tuple[History, int]:
    """Solve for the linear head from all cached views of the training slices.

    Returns:
        Validation IoU, strength and threshold of every candidate, and the number of the chosen one.
    """
    head, path = cast(Linear, segmenter.head), ridge_path(views, train)
    choice = _choose(path.predict, segmenter, volumes, views)
    path.write(head, choice.i, choice.threshold, choice.slope)
    return _history(choice, "ridge/strength", path.strengths), choice.i


def fit_knn(
    segmenter: Segmenter, volumes: Sequence[Volume], views: Views, train: TrainSettings, seed: int
) -> tuple[History, int]:
    """Fill the bank with training tokens and choose k.

    Returns:
        Validation IoU, k and threshold of every candidate, and the number of the chosen one.
    """
    head = cast(Nearest, segmenter.head)
    tokens, classes = draw_bank(views, seed)
    head.fill(tokens, classes, tokens.mean(0), tokens.std(0).clamp_min(1e-6))
    choice = _choose(lambda found: head.shares(found, KS), segmenter, volumes, views)
    for name, value in (
        ("k", KS[choice.i]),
        ("threshold", choice.threshold),
        ("slope", choice.slope),
    ):
        getattr(head, name).fill_(value)
    return _history(choice, "knn/k", KS), choice.i


FITS = {"ridge": fit_ridge, "knn": fit_knn}
"""Regimes that are fitted at once: fit(segmenter, volumes, views, train, seed) -> (history, number of the chosen entry)."""


def ridge_path(views: Views, train: TrainSettings) -> Solutions:
    """Ridge solutions of all strengths; with `balanced` the datasets of a union weigh the same, whatever their size."""
    each = [
        _total(sums_of(*some) for view in own for some in _training_tokens(view)) for own in views
    ]
    if train.balanced:
        each = [sums.weighted(1 / sums.n) for sums in each]
    return solve(_total(each), STRENGTHS)


def draw_bank(views: Views, seed: int, size: int = BANK) -> tuple[torch.Tensor, torch.Tensor]:
    """Training tokens (n, D) float32 and their class (n,): the same number from each dataset and each of its slices.

    They are drawn by the seed from the plain view. Slices whose tokens do not suffice give all they have.
    """
    tokens, classes = [], []
    for number, own in enumerate(views):
        slices = own[0].split["train"]
        shares = np.diff(np.linspace(0, size // len(views), len(slices) + 1).round().astype(int))
        for z, share in zip(slices, shares, strict=True):
            rows = own[0].rows_of_slice(z)
            found, filled = _flat(own[0], rows)
            rng = np.random.default_rng([seed, number, z])
            drawn = np.sort(rng.choice(len(found), min(int(share), len(found)), replace=False))
            tokens.append(torch.from_numpy(found[drawn]))
            classes.append(torch.from_numpy(filled[drawn]))
    return torch.cat(tokens).float(), torch.cat(classes)


def choose(counts: npt.NDArray[np.float64]) -> Choice:
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


def _slope(counts: npt.NDArray[np.float64], threshold: float) -> float:
    """Of the logistic function of (score - threshold) with the least log loss; datasets weigh the same."""
    from scipy.optimize import minimize_scalar

    middles = (EDGES[1:] + EDGES[:-1]) / 2 - threshold
    weights = (counts / counts.sum((1, 2), keepdims=True)).sum(0)

    def loss(log_slope: float) -> float:
        z = np.exp(log_slope) * middles
        return float(weights[0] @ np.logaddexp(0, z) + weights[1] @ np.logaddexp(0, -z))

    return float(np.exp(minimize_scalar(loss, bounds=(0.0, np.log(100.0)), method="bounded").x))


def _choose(
    scores: Scores, segmenter: Segmenter, volumes: Sequence[Volume], views: Views
) -> Choice:
    return choose(
        np.stack(
            [_counts(scores, segmenter, v, own[0]) for v, own in zip(volumes, views, strict=True)]
        )
    )


@torch.inference_mode()
def _counts(
    scores: Scores, segmenter: Segmenter, volume: Volume, view: TokenView
) -> npt.NDArray[np.float64]:
    """(candidates, 2, bins) pixels of the validation slices, background and foreground, by their interpolated score."""
    geo = geometry_of(volume, segmenter.spec, segmenter.backbone.arch.patch)
    device = next(segmenter.backbone.parameters()).device
    total: list[npt.NDArray[np.float64]] = []
    for z in volume.split["val"]:
        rows, label = view.rows_of_slice(z), np.asarray(volume.label[z]) > 0
        corners = [(int(y), int(x)) for _, y, x in view.index[rows]]
        found = torch.cat(
            [
                scores(torch.from_numpy(np.array(view.tokens[some])).to(device))
                for some in _batches(rows)
            ],
            1,
        )
        per_slice = []
        for coarse in found:  # candidate by candidate: all maps at full resolution would not fit
            maps = F.interpolate(
                coarse[:, None].float(), geo.tile, mode="bilinear", align_corners=False
            )[:, 0]
            score = np.clip(blend(maps.cpu().numpy(), corners, geo), EDGES[0], EDGES[-1])
            classes = (score[~label], score[label])
            per_slice.append(
                [
                    np.histogram(values, len(EDGES) - 1, (EDGES[0], EDGES[-1]))[0]
                    for values in classes
                ]
            )
        total.append(np.asarray(per_slice, np.float64))
    return np.asarray(np.sum(total, 0))


def _training_tokens(
    view: TokenView,
) -> Iterator[tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]]:
    """Tokens (n, D) and classes (n,) of a view's training rows, some rows at a time."""
    for rows in _batches(view.rows_of("train")):
        yield _flat(view, rows)


def _flat(
    view: TokenView, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Tokens (n, D) of some rows and whether each token's patch is foreground (n,), 0 or 1."""
    tokens, labels = np.array(view.tokens[rows]), np.asarray(view.labels[rows])
    n, _, h, w = tokens.shape
    occupancy = labels.reshape(n, h, labels.shape[1] // h, w, labels.shape[2] // w).mean(
        (2, 4), dtype=np.float32
    )
    return np.moveaxis(tokens, 1, -1).reshape(n * h * w, -1), (occupancy >= OCCUPANCY).astype(
        np.float32
    ).ravel()


def _batches(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def _total(parts: Iterable[Sums]) -> Sums:
    return reduce(add, parts)


def _middle(places: npt.NDArray[np.int64]) -> int:
    return int(places[len(places) // 2])


def _history(choice: Choice, name: str, values: Sequence[float]) -> History:
    return [
        {"val/iou": float(iou), name: float(value), "threshold": float(threshold)}
        for (iou, threshold), value in zip(choice.table, values, strict=True)
    ]
