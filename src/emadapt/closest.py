"""Which of its training datasets a model takes a volume for: its own name, or the one whose tokens are nearest.

With normalisation layers per dataset (`align: norm`) a training dataset's name decides, as it does in training. With an adapter
and a head per dataset (`routed`) the tokens of the pretrained backbone decide, for every volume: a name would be an oracle, which
nobody has for new data, and would hide what the router gets wrong.

The tokens of the last block over some slices are described by their mean and standard deviation per channel. The distance
is the Fréchet distance of two Gaussians with diagonal covariances, each channel divided by its root mean square deviation over
the training datasets, so that the few large channels of a ViT do not decide alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from emadapt.data.ingest import Volume
from emadapt.data.patches import as_input
from emadapt.data.tiles import geometry_of, to_input
from emadapt.device import autocast
from emadapt.models.regimes import pretrained
from emadapt.models.segmenter import Segmenter
from emadapt.tokens import TokenView

SLICES = 8
BATCH_TILES = 16

Statistics = dict[str, list[float]]
"""`mean` and `std` of the tokens, a value per channel."""


def domain_of(
    segmenter: Segmenter, volume: Volume, slices: Sequence[int], view: TokenView | None = None
) -> tuple[str, dict[str, float]]:
    """The training dataset that `volume` is taken for, and the distances that say so; said on the output where they do.

    Args:
        segmenter: with `domains`, in eval mode.
        volume: the dataset.
        slices: that are to be segmented; some of them are looked at.
        view: its cached tokens, or None to run the backbone.
    """
    known, is_routed = {name: own for name, own in segmenter.domains.items() if own}, segmenter.regime.align == "routed"
    if volume.name in segmenter.domains and not (is_routed and known):  # while training there are no statistics
        return volume.name, {}
    away = distances(token_statistics(segmenter, volume, slices, view), known)
    nearest = min(away, key=lambda name: away[name])
    said = ", ".join(f"{name} {value:.3g}" for name, value in away.items())
    if not is_routed:
        print(f"{volume.name} is not a dataset of the training set: normalised as {nearest}, the nearest (distances: {said})")
    else:
        other = f", not to {volume.name}" if volume.name in known else ", the nearest in the training set"
        print(f"{volume.name} is routed to {nearest}{other if nearest != volume.name else ''} (distances: {said})")
    return nearest, away


def distances(found: Statistics, known: Mapping[str, Statistics]) -> dict[str, float]:
    """Distance to each of `known`, a mean over channels.

    Returns:
        0 for equal statistics; 1 where means differ by as much as tokens deviate.
    """
    scale = np.sqrt(np.mean(np.square([own["std"] for own in known.values()]), 0)) + 1e-12

    def distance(own: Statistics) -> float:
        parts = [(np.asarray(found[k]) - np.asarray(own[k])) / scale for k in ("mean", "std")]
        return float(np.mean(np.square(parts[0]) + np.square(parts[1])))

    return {name: distance(own) for name, own in known.items()}


def token_statistics(segmenter: Segmenter, volume: Volume, slices: Sequence[int], view: TokenView | None = None) -> Statistics:
    """Of the last block's tokens over at most `SLICES` of the slices, evenly spaced; of images where there is no backbone.

    For a router the adapters are off, since which one is to be used is not known yet.
    """
    was_training = segmenter.training
    segmenter.eval()
    with pretrained(segmenter.backbone) if segmenter.regime.align == "routed" else nullcontext():
        count, total, squares = _sums(segmenter, volume, slices, view)
    segmenter.train(was_training)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return {"mean": [float(f"{v:.6g}") for v in mean], "std": [float(f"{v:.6g}") for v in std]}


@torch.inference_mode()
def _sums(
    segmenter: Segmenter, volume: Volume, slices: Sequence[int], view: TokenView | None
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many tokens, their sum and that of their squares, (D,) float64."""
    geo = geometry_of(volume, segmenter.spec, segmenter.backbone.arch.patch)
    device = next(segmenter.head.parameters()).device
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for k in np.unique(np.linspace(0, len(slices) - 1, min(SLICES, len(slices))).round().astype(int)):
        padded = to_input(np.asarray(volume.image[slices[k]]), geo)
        tiles = [as_input(padded[y : y + geo.tile[0], x : x + geo.tile[1]]) for y, x in geo.corners(0.0)]
        rows = view.rows_of_slice(slices[k]) if view is not None else range(len(tiles))
        for start in range(0, len(rows), BATCH_TILES):
            some = rows[start : start + BATCH_TILES]
            batch = torch.stack([tiles[i] for i in some]) if view is None else view.read(slice(some[0], some[-1] + 1))
            with autocast(segmenter.spec.precision):
                tokens = segmenter.tokens(batch.to(device))[0][-1].double().movedim(1, -1).flatten(0, -2).cpu()  # n,D
            count, total, squares = count + len(tokens), total + tokens.sum(0), squares + tokens.square().sum(0)
    return count, total, squares
