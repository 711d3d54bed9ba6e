"""What a dataset's tokens are like. `segment` compares a volume with the training data.

The tokens of the last block over some slices are described by their mean and standard deviation per
channel. Some tiles are also shown with black and white exchanged: the direction between the two
kinds of tokens tells the polarity of a volume, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.splits import evenly_spaced
from emadapt.data.tiles import geometry_of
from emadapt.models.backbones import Backbone
from emadapt.models.device import autocast
from emadapt.models.segmenter import BATCH_TILES, Inputs, Segmenter
from emadapt.models.tokens import TokenView
from emadapt.volumes.grey import MIDDLE

FEW = 4
"""Slices of a dataset that are looked at."""
TILES = 12
"""Tiles of them of which grey values and polarity are taken."""
PERCENTILES = (5, 50, 95)
"""Of grey values."""
RIDGE = 0.1
"""Added to the tokens' covariance, in units of its mean variance."""
TOKENS = 2**13
"""Tokens that their covariance is taken of, at most."""

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
        validation slices from them; `grey`, `PERCENTILES` of what the model sees, 0 to 255. Of a
        model with a backbone, `polarity`, a value per channel (see `polarity_of`), and `found`,
        shares of foreground as it is and with black and white exchanged.
    """
    facts: dict[str, dict[str, Any]] = {}
    for number, volume in enumerate(volumes):
        view = views[number] if views else None
        own = _of_slices(segmenter, volume, _evenly(volume.split["train"]), view)
        single = [_of_slices(segmenter, volume, [z], view) for z in _evenly(volume.split["val"])]
        usual = [float(f"{shift(found, own):.4g}") for found in single]
        tiles = torch.cat(list(_tiles(segmenter, volume, _evenly(volume.split["train"]), TILES)))
        facts[volume.name] = {**own, "usual": usual, "grey": grey_of(tiles)}
        if isinstance(segmenter.backbone, Backbone):
            facts[volume.name] |= _polarity_facts(*both_ways(segmenter, tiles))
    return facts


def grey_of(tiles: torch.Tensor) -> list[float]:
    """`PERCENTILES`, 0 to 255, of tiles with values in [0, 1]; without what is `MIDDLE`."""
    values = np.rint(255 * tiles.numpy())
    values = values[values != MIDDLE]
    return [float(v) for v in np.percentile(values, PERCENTILES)] if values.size else []


Seen = tuple[npt.NDArray[np.float32], float]
"""Tokens (n, D), and the share of foreground."""


@torch.inference_mode()
def both_ways(segmenter: Segmenter, tiles: torch.Tensor) -> tuple[Seen, Seen]:
    """What a model makes of tiles (n, 1 or 3, h, w), and of them with black and white exchanged.

    Each is stretched between its own percentiles first, so that brightness tells nothing.
    """
    segmenter.eval()
    step = max(1, tiles[0].numel() // 10_000)
    sample = tiles.flatten(1)[:, ::step]
    low, high = torch.quantile(sample, torch.tensor([0.005, 0.995]), dim=1)[:, :, None, None, None]
    stretched = ((tiles - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    seen = []

    def run(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(segmenter.spec.precision):
            maps = segmenter.tokens(part.to(segmenter.device))
            logits = segmenter(maps, (part.shape[-2], part.shape[-1]))
        return maps[-1].float().cpu(), (logits.argmax(1) > 0).float().cpu()

    for shown in (stretched, 1 - stretched):
        tokens, found = [], []
        for batch in shown.split(BATCH_TILES):
            last, is_foreground = segmenter.fitting(run, batch)
            tokens.append(last.movedim(1, -1).flatten(0, -2))
            found.append(is_foreground.mean())
        seen.append((torch.cat(tokens).numpy(), float(torch.stack(found).mean())))
    return seen[0], seen[1]


def polarity_of(plain: Seen, exchanged: Seen, direction: Sequence[float]) -> float:
    """1: black and white as in the training data; -1: exchanged; near 0: cannot be told."""
    return float((plain[0].mean(0) - exchanged[0].mean(0)) @ np.asarray(direction)) / 2


def _polarity_facts(plain: Seen, exchanged: Seen) -> dict[str, Any]:
    """Linear discriminant of the two kinds of tokens, scaled so that the mean difference is 2."""
    some = [tokens[:: max(1, len(tokens) // TOKENS)] for tokens, _ in (plain, exchanged)]
    within = (np.cov(some[0].T) + np.cov(some[1].T)) / 2
    ridge = RIDGE * np.trace(within) / len(within) * np.eye(len(within))
    away = plain[0].mean(0) - exchanged[0].mean(0)
    direction = np.linalg.solve(within + ridge, away)
    direction *= 2 / (away @ direction)
    return {
        "polarity": [float(f"{v:.6g}") for v in direction],
        "found": [round(plain[1], 4), round(exchanged[1], 4)],
    }


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
    segmenter.eval()
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for batch in batches:
        with autocast(segmenter.spec.precision):
            (last,) = segmenter.fitting(
                lambda b: segmenter.tokens(b.to(segmenter.device))[-1:], batch
            )
            tokens = last.double().movedim(1, -1).flatten(0, -2).cpu()  # n,D
        count, total = count + len(tokens), total + tokens.sum(0)
        squares = squares + tokens.square().sum(0)
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
    return [slices[k] for k in evenly_spaced(len(slices), FEW)]


def _tiles(
    segmenter: Segmenter, volume: Volume, slices: Sequence[int], most: int | None = None
) -> Iterator[torch.Tensor]:
    """Batches of all tiles of slices, or of `most`, evenly spaced."""
    geo = geometry_of(volume, segmenter.spec, segmenter.patch)
    height, width = geo.tile
    for z in slices:
        padded, corners = segmenter.shown(volume, z, geo), geo.corners(0.0)
        if most:
            wanted = max(1, most // len(slices))
            corners = [corners[k] for k in evenly_spaced(len(corners), wanted)]
        tiles = [as_input(padded[y : y + height, x : x + width]) for y, x in corners]
        for start in range(0, len(tiles), BATCH_TILES):
            yield torch.stack(tiles[start : start + BATCH_TILES])
