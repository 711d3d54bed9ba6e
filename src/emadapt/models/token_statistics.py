"""What a dataset's tokens are like. `segment` compares a volume with the training data.

The tokens of the last block over some slices are described by their mean and standard deviation per
channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry_of
from emadapt.models.device import autocast
from emadapt.models.segmenter import BATCH_TILES, Inputs, Segmenter
from emadapt.models.tokens import TokenView

FEW = 4
"""Slices of a dataset that are looked at."""

Statistics = dict[str, list[float]]
"""`mean` and `std` of the tokens, a value per channel."""


def token_facts(
    segmenter: Segmenter, volumes: Sequence[Volume], views: Sequence[TokenView]
) -> dict[str, dict[str, Any]]:
    """What model.json says of the tokens of each training dataset.

    Args:
        segmenter: trained.
        volumes: that it was trained on.
        views: their cached tokens, or none to run the backbone.

    Returns:
        Per dataset `mean` and `std` over a few training slices, and `usual`, the shift of single
        validation slices from them.
    """
    facts: dict[str, dict[str, Any]] = {}
    for number, volume in enumerate(volumes):
        view = views[number] if views else None
        own = _of_slices(segmenter, volume, _evenly(volume.split["train"]), view)
        single = [_of_slices(segmenter, volume, [z], view) for z in _evenly(volume.split["val"])]
        usual = [float(f"{shift(found, own):.4g}") for found in single]
        facts[volume.name] = {**own, "usual": usual}
    return facts


def shift(found: Statistics, own: Statistics) -> float:
    """Mean over channels of the squared difference of means, in units of `own`'s deviation.

    Deviations are left out: a few tiles with tokens of very large norm, as ViTs have them, change
        these most.
    """
    away = (np.asarray(found["mean"]) - np.asarray(own["mean"])) / (np.asarray(own["std"]) + 1e-12)
    return float(np.mean(np.square(away)))


@torch.inference_mode()
def statistics_of(segmenter: Segmenter, batches: Iterable[Inputs]) -> Statistics:
    """Mean and deviation, per channel, of the last block's tokens.

    Of a model without a backbone, the grey values of the images.
    """
    was_training = segmenter.training
    segmenter.eval()
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for batch in batches:
        with autocast(segmenter.spec.precision):
            last = segmenter.tokens(batch.to(segmenter.device))[-1]
            tokens = last.double().movedim(1, -1).flatten(0, -2).cpu()  # n,D
        count, total = count + len(tokens), total + tokens.sum(0)
        squares = squares + tokens.square().sum(0)
    segmenter.train(was_training)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return {"mean": [float(f"{v:.6g}") for v in mean], "std": [float(f"{v:.6g}") for v in std]}


def _of_slices(
    segmenter: Segmenter, volume: Volume, slices: Sequence[int], view: TokenView | None
) -> Statistics:
    if view is None:
        return statistics_of(segmenter, _tiles(segmenter, volume, slices))
    return statistics_of(segmenter, (part for z in slices for part in view.batches(z, BATCH_TILES)))


def _evenly(slices: Sequence[int]) -> list[int]:
    places = np.linspace(0, len(slices) - 1, min(FEW, len(slices))).round().astype(int)
    return [slices[k] for k in np.unique(places)]


def _tiles(segmenter: Segmenter, volume: Volume, slices: Sequence[int]) -> Iterator[torch.Tensor]:
    geo = geometry_of(volume, segmenter.spec, segmenter.patch)
    height, width = geo.tile
    for z in slices:
        padded, corners = segmenter.shown(volume, z, geo), geo.corners(0.0)
        tiles = [as_input(padded[y : y + height, x : x + width]) for y, x in corners]
        for start in range(0, len(tiles), BATCH_TILES):
            yield torch.stack(tiles[start : start + BATCH_TILES])
