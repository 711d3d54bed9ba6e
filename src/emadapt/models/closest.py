"""Which of its training datasets a model takes a volume for: its own name, or the one whose tokens are nearest.

With normalisation layers per dataset (`align: norm`) a training dataset's name decides, as it does in training. With an adapter
and a head per dataset (`routed`) the tokens of the pretrained backbone decide, for every volume: a name would be an oracle, which
nobody has for new data, and would hide what the router gets wrong.

The tokens of the last block over some slices are described by their mean and standard deviation per channel. The distance
is the Fréchet distance of two Gaussians with diagonal covariances, each channel divided by its root mean square deviation over
the training datasets, so that the few large channels of a ViT do not decide alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from emadapt.data.crops import Inputs, as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry_of, to_input, with_neighbours
from emadapt.models.device import autocast
from emadapt.models.regimes import pretrained
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView

SLICES, FEW = 8, 4
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
    known, is_routed = any(segmenter.domains.values()), segmenter.regime.align == "routed"
    if volume.name in segmenter.domains and not (
        is_routed and known
    ):  # while training there are no statistics
        return volume.name, {}
    return nearest(segmenter, token_statistics(segmenter, volume, slices, view), volume.name)


def nearest(segmenter: Segmenter, found: Statistics, what: str) -> tuple[str, dict[str, float]]:
    """The training dataset whose tokens are nearest to those of `what`, and the distances; said on the output."""
    known = {name: own for name, own in segmenter.domains.items() if own}
    away = distances(found, known)
    name = min(away, key=lambda key: away[key])
    said = ", ".join(f"{key} {value:.3g}" for key, value in away.items())
    if segmenter.regime.align != "routed":
        print(
            f"{what} is not a dataset of the training set: normalised as {name}, the nearest (distances: {said})"
        )
    else:
        other = f", not to {what}" if what in known else ", the nearest in the training set"
        print(f"{what} is routed to {name}{other if name != what else ''} (distances: {said})")
    return name, away


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


def token_statistics(
    segmenter: Segmenter,
    volume: Volume,
    slices: Sequence[int],
    view: TokenView | None = None,
    most: int = SLICES,
) -> Statistics:
    """Of the tokens of at most so many of the slices, evenly spaced; of images where there is no backbone."""
    chosen = np.unique(np.linspace(0, len(slices) - 1, min(most, len(slices))).round().astype(int))
    return statistics_of(segmenter, _batches(segmenter, volume, [slices[k] for k in chosen], view))


def shift(found: Statistics, own: Statistics) -> float:
    """How far tokens have moved: mean over channels of the squared difference of their means, in units of `own`'s deviation.

    Deviations are left out: a few tiles with tokens of very large norm, as ViTs have them, change these most.
    """
    away = (np.asarray(found["mean"]) - np.asarray(own["mean"])) / (np.asarray(own["std"]) + 1e-12)
    return float(np.mean(np.square(away)))


def token_facts(
    segmenter: Segmenter, volumes: Sequence[Volume], views: Sequence[TokenView]
) -> dict[str, dict[str, Any]]:
    """What model.json says of the tokens of each training dataset, for a later look at whether other data are like it.

    Args:
        segmenter: trained.
        volumes: of the training set.
        views: the cached tokens of each, or none at all to run the backbone.

    Returns:
        Per dataset `mean` and `std` over a few training slices, and `usual`, the shift of single validation slices from them.
    """
    facts: dict[str, dict[str, Any]] = {}
    for k, volume in enumerate(volumes):
        view = views[k] if views else None
        if segmenter.domains:
            segmenter.use(volume.name)
        own = token_statistics(segmenter, volume, volume.split["train"], view, FEW)
        held_out = volume.split["val"]
        some = [
            held_out[k]
            for k in np.unique(
                np.linspace(0, len(held_out) - 1, min(FEW, len(held_out))).round().astype(int)
            )
        ]
        usual = [shift(token_statistics(segmenter, volume, [z], view), own) for z in some]
        facts[volume.name] = {**own, "usual": [float(f"{d:.4g}") for d in usual]}
    return facts


def _batches(
    segmenter: Segmenter, volume: Volume, slices: Sequence[int], view: TokenView | None
) -> Iterator[Inputs]:
    """Tiles of the slices, or what is cached of them."""
    geo = geometry_of(volume, segmenter.spec, segmenter.backbone.arch.patch)
    for z in slices:
        padded = to_input(with_neighbours(volume, z, segmenter.spec.context), geo)
        tiles = [
            as_input(padded[y : y + geo.tile[0], x : x + geo.tile[1]]) for y, x in geo.corners(0.0)
        ]
        rows = view.rows_of_slice(z) if view is not None else range(len(tiles))
        for start in range(0, len(rows), BATCH_TILES):
            some = rows[start : start + BATCH_TILES]
            yield (
                torch.stack([tiles[i] for i in some])
                if view is None
                else view.read(slice(some[0], some[-1] + 1))
            )


def statistics_of(segmenter: Segmenter, batches: Iterable[Inputs]) -> Statistics:
    """Mean and deviation, per channel, of the last block's tokens of images (B, 1, H, W), or of what is cached of them.

    For a router the adapters are off, since which one is to be used is not known yet.
    """
    was_training = segmenter.training
    segmenter.eval()
    # Weights are changed outside of `_sums`: what torch's inference mode makes cannot be changed after it.
    with pretrained(segmenter.backbone) if segmenter.regime.align == "routed" else nullcontext():
        count, total, squares = _sums(segmenter, batches)
    segmenter.train(was_training)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return {"mean": [float(f"{v:.6g}") for v in mean], "std": [float(f"{v:.6g}") for v in std]}


@torch.inference_mode()
def _sums(
    segmenter: Segmenter, batches: Iterable[Inputs]
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many tokens, their sum and that of their squares, (D,) float64."""
    own = itertools.chain(
        segmenter.head.parameters(), segmenter.head.buffers(), segmenter.parameters()
    )
    device = next(own).device  # the head of kNN has buffers only, that of an outside system nothing
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for batch in batches:
        with autocast(segmenter.spec.precision):
            last = (
                batch if segmenter.regime.outside else segmenter.tokens(batch.to(device))[0][-1]
            )  # it hands on no image
            tokens = torch.as_tensor(last).double().movedim(1, -1).flatten(0, -2).cpu()  # n,D
        count, total, squares = (
            count + len(tokens),
            total + tokens.sum(0),
            squares + tokens.square().sum(0),
        )
    return count, total, squares
