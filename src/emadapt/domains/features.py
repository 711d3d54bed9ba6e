"""What diagnostics read of one model on one dataset: moments of all tokens, and a subsample.

They are made in one pass over the slices. `token_sources` gives the tokens. All models read the
same slices. The subsample has the same places on training slices; on the others the tiles of the
token cache overlap, and those of an adapted or random backbone do not.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.data.foreground import patch_classes
from emadapt.data.ingest import Volume
from emadapt.data.splits import evenly_spaced
from emadapt.data.tiles import Geometry
from emadapt.domains.moments import Moments, slice_moments
from emadapt.errors import InputError
from emadapt.files import new_array
from emadapt.progress import track
from emadapt.study.datasets import ONE_CLASS
from emadapt.study.training import DiagnoseSettings

SCRATCH = Path("scratch")

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Tiles = Iterator[tuple[tuple[int, int], npt.NDArray[np.float32], npt.NDArray[np.uint8]]]
"""Of one slice: a tile's corner (y, x), its tokens (D, h, w), its labels (H, W)."""


@dataclass(frozen=True)
class Features:
    """One model on one dataset.

    Attributes:
        name: of the dataset.
        slices: (S,) slice numbers, ascending.
        parts: (S,) "train", "val" or "test" of each.
        moments: of the last block's tokens in each slice.
        tokens: (n, D) float32 subsample, in the order of slice, then y, x.
        ids: (n,) the class of their patches, 0 in the background.
        at: (n,) the place in `slices` of each token's slice.
        where: (n, 2) their centres (y, x) in input pixels.
        classes: names of the ids 1, 2, ...
        labelled: whether the dataset has labels; without them `ids` mean nothing.
    """

    name: str
    slices: Numbers
    parts: npt.NDArray[np.str_]
    moments: Moments
    tokens: Floats
    ids: npt.NDArray[np.uint8]
    at: Numbers
    where: Floats
    classes: tuple[str, ...] = ONE_CLASS
    labelled: bool = True

    def within(self, *parts: str) -> npt.NDArray[np.bool_]:
        """(n,) Which tokens of the subsample are of slices of these parts."""
        return np.isin(self.at, np.flatnonzero(np.isin(self.parts, parts)))


def chosen_slices(volume: Volume, spec: DiagnoseSettings) -> tuple[Numbers, npt.NDArray[np.str_]]:
    """Slice numbers, evenly spaced over train, val and test together, and the part of each.

    Raises:
        InputError: fewer slices than z-blocks.
    """
    part = {z: name for name, slices in volume.split.items() for z in slices}
    slices = np.asarray(sorted(part))
    if len(slices) < spec.blocks:
        raise InputError(
            f"dataset {volume.name}",
            found=f"{len(slices)} slices",
            expected=f"at least {spec.blocks}, one for each block of `diagnose.blocks`",
            do="Lower `diagnose.blocks`.",
        )
    if spec.slices:
        slices = slices[evenly_spaced(len(slices), spec.slices)]
    return slices, np.asarray([part[int(z)] for z in slices])


def features_of(
    volume: Volume, spec: DiagnoseSettings, geo: Geometry, tiles: Callable[[int], Tiles]
) -> Features:
    """Make features in one pass over the tokens.

    Args:
        volume: the dataset.
        spec: which slices, how many tokens.
        geo: how slices are tiled.
        tiles: of a slice number, its tiles.

    Raises:
        InputError: too few slices, or tokens that are not finite.
    """
    slices, parts = chosen_slices(volume, spec)
    each = -(-spec.tokens // len(slices))
    counts, totals, sample = [], [], []
    for place, z in enumerate(track(slices, f"features {volume.name}", len(slices))):
        tokens, found, centres = _one_slice(tiles(int(z)), geo)
        _check_finite(tokens, volume.name, int(z))
        known = ~np.isnan(found)
        tokens, centres = tokens[known], centres[known]
        ids = found[known].clip(0, len(volume.scored)).astype(np.uint8)  # a boundary is foreground
        count, total, square = slice_moments(tokens)
        if place == 0:
            outer = _unnamed_array((len(slices), *square.shape))
        counts.append(count)
        totals.append(total)
        outer[place] = square
        rng = np.random.default_rng([spec.seed, int(z)])  # the same draw for every model
        drawn = np.sort(rng.choice(len(tokens), min(each, len(tokens)), replace=False))
        at = np.full(len(drawn), place)
        sample.append((tokens[drawn], ids[drawn], at, centres[drawn]))
    moments = Moments(np.asarray(counts), np.asarray(totals), outer)
    tokens, ids, at, where = (np.concatenate(own) for own in zip(*sample, strict=True))
    return Features(
        volume.name, slices, parts, moments, tokens, ids, at, where, volume.scored, volume.labelled
    )


def _unnamed_array(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """An array on the disk, as it may be larger than memory; its room is free when it is not used.

    The file has lost its name when this returns, and lasts as long as the mapping.
    """
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=SCRATCH) as file:
        return new_array(Path(file.name), np.float64, shape)


def patches(tile: npt.NDArray[Any], patch: int) -> npt.NDArray[Any]:
    """(H, W) -> (h, w, patch, patch): the pixels of each token, a view."""
    rows, columns = tile.shape[0] // patch, tile.shape[1] // patch
    return tile.reshape(rows, patch, columns, patch).swapaxes(1, 2)


def _check_finite(tokens: Floats, dataset: str, z: int) -> None:
    if bad := int((~np.isfinite(tokens)).any(1).sum()):
        raise InputError(
            f"tokens of {dataset}, slice {z}",
            found=f"{bad} of {len(tokens)} with NaN or infinite values",
            expected="finite tokens",
            do="Check the model's weights.",
        )


def _one_slice(tiles: Tiles, geo: Geometry) -> tuple[Floats, Floats, Floats]:
    """Tokens (n, D) of a slice, `patch_classes` (n,) and centres (n, 2), in the order of y, then x.

    Each place is there once, and none is in the padding. If tiles overlap, a token comes from the
    tile whose middle is nearest.
    """
    found = list(tiles)
    edges = [
        _borders(sorted({corner[axis] for corner, _, _ in found}), geo.tile[axis])
        for axis in (0, 1)
    ]
    tokens, ids, centres = [], [], []
    for corner, grid, label in found:
        middles, kept = [], []
        for axis, n in enumerate(grid.shape[1:]):
            middle = corner[axis] + (0.5 + np.arange(n)) * geo.patch
            low, high = edges[axis][corner[axis]]
            middles.append(middle)
            kept.append((middle >= low) & (middle < high) & (middle < geo.resized[axis]))
        keep = np.outer(*kept)
        tokens.append(grid.transpose(1, 2, 0)[keep])
        ids.append(patch_classes(patches(label, geo.patch), (2, 3))[keep])
        grid_of_centres = np.stack(np.meshgrid(*middles, indexing="ij"), -1)
        centres.append(grid_of_centres[keep].astype(np.float32))
    merged = np.concatenate(centres)
    order = np.lexsort((merged[:, 1], merged[:, 0]))
    return np.concatenate(tokens)[order], np.concatenate(ids)[order], merged[order]


def _borders(corners: list[int], side: int) -> dict[int, tuple[float, float]]:
    """Along one axis: from where to where a tile is the one whose middle is nearest."""
    middles = [(a + b + side) / 2 for a, b in itertools.pairwise(corners)]
    lows, highs = [-np.inf, *middles], [*middles, np.inf]
    return {c: (low, high) for c, low, high in zip(corners, lows, highs, strict=True)}
