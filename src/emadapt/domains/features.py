"""What diagnostics read of one model on one dataset: moments of all its tokens and a subsample, from one pass, kept on disk.

A *model* is the pretrained backbone (its tokens come from the token cache), an adapted one (its
tokens are computed), the same architecture with random weights, or no backbone at all: raw pixels
of each patch. All read the same slices.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.splits import evenly_spaced
from emadapt.data.tiles import (
    Geometry,
    Grey,
    geometry_of,
    label_to_input,
    to_input,
    with_neighbours,
)
from emadapt.domains.moments import Moments, slice_moments
from emadapt.errors import InputError
from emadapt.files import new_array, write_json
from emadapt.models.backbones import Backbone
from emadapt.models.tokens import CACHE, OCCUPANCY, compute_tokens, token_key, token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.keys import digest
from emadapt.study.training import DiagnoseSettings

KEPT = Path("scratch/features")
FORMAT = 1  # raise when the same settings begin to mean other content
BATCH_TOKENS = 4096

Floats = npt.NDArray[np.float32]
Tiles = Iterator[tuple[tuple[int, int], npt.NDArray[np.float32], npt.NDArray[np.uint8]]]
"""Of one slice: a tile's corner (y, x), its tokens (D, h, w), its labels (H, W)."""


@dataclass(frozen=True)
class Features:
    """One model on one dataset.

    Attributes:
        name: what to call it: the dataset, or the dataset and what was done to it.
        slices: (S,) slice numbers, ascending.
        parts: (S,) "train", "val" or "test" of each.
        moments: of the last block's tokens per slice.
        tokens: (n, D) float32 subsample, in the order of slice, then y, x.
        foreground: (n,) their class by patch occupancy.
        at: (n,) the place in `slices` of each token's slice.
        where: (n, 2) their centres (y, x) in input pixels.
        grids: place in `slices` -> (h, w, D) float16 tokens of a whole slice, to be looked at.
        labelled: whether the dataset has labels; without them `foreground` is False throughout and
            means nothing.
    """

    name: str
    slices: npt.NDArray[np.int64]
    parts: npt.NDArray[np.str_]
    moments: Moments
    tokens: Floats
    foreground: npt.NDArray[np.bool_]
    at: npt.NDArray[np.int64]
    where: Floats
    grids: dict[int, npt.NDArray[np.float16]]
    labelled: bool = True

    def of(self, slices: npt.NDArray[np.int64], name: str) -> Features:
        """The same for some places in `slices` only."""
        keep = np.isin(self.at, slices)
        place = np.full(len(self.slices), -1)
        place[slices] = np.arange(len(slices))
        moments = Moments(
            self.moments.count[slices], self.moments.total[slices], self.moments.outer[slices]
        )
        return Features(
            name,
            self.slices[slices],
            self.parts[slices],
            moments,
            self.tokens[keep],
            self.foreground[keep],
            place[self.at[keep]],
            self.where[keep],
            {},
            self.labelled,
        )

    def places(self, *parts: str) -> npt.NDArray[np.int64]:
        """Places in `slices` that belong to these parts."""
        return np.flatnonzero(np.isin(self.parts, parts))

    def within(self, *parts: str) -> npt.NDArray[np.bool_]:
        """(n,) Which tokens of the subsample are of slices of these parts."""
        return np.isin(self.at, self.places(*parts))


def chosen_slices(
    volume: Volume, spec: DiagnoseSettings
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
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
            do="Lower `diagnose.blocks`.",
            expected=f"at least {spec.blocks}, one for each block of `diagnose.blocks`",
        )
    if spec.slices:
        slices = slices[evenly_spaced(len(slices), spec.slices)]
    return slices, np.asarray([part[int(z)] for z in slices])


def pretrained_features(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, own: DiagnoseSettings
) -> Features:
    """From the token cache that the `tokens` stage filled.

    Raises:
        InputError: there is none for this backbone and dataset, or it is of another backbone, or
            holds NaN.
    """
    folder = CACHE / token_key(backbone, spec, volume, 0)
    if not (folder / "manifest.json").is_file():
        raise InputError(
            folder,
            found="no token cache for these weights, settings and data",
            expected="what the tokens stage writes",
            do=f"Run `emadapt tokens BACKBONE {volume.name}`.",
        )
    weights = json.loads((folder / "manifest.json").read_text())["weights"]["sha256"]
    if weights != backbone.provenance.sha256:
        raise InputError(
            folder,
            found=f"tokens of another backbone (weights {weights[:12]})",
            do=f"Remove {folder}.",
            expected=f"tokens of {backbone.arch_name} (weights {backbone.provenance.sha256[:12]})",
        )
    view = token_views(backbone, spec, volume, range(1))[0]
    last = slice(-backbone.arch.dim, None)

    def tiles(z: int) -> Tiles:
        for row in view.rows_of_slice(z):
            _, y, x = view.index[row]
            yield (
                (int(y), int(x)),
                np.asarray(view.tokens[row, last], np.float32),
                np.asarray(view.labels[row]),
            )

    geo = geometry_of(volume, spec, backbone.arch.patch)
    return _kept(volume, own, geo, volume.name, tiles, ["cache", folder.name])


def computed_features(
    backbone: Backbone,
    spec: BackboneSettings,
    volume: Volume,
    own: DiagnoseSettings,
    model: str,
    change: Callable[[Grey], Grey] | None = None,
    name: str = "",
) -> Features:
    """From a pass of `backbone` over the slices.

    Args:
        backbone: adapted (adapters merged), or with random weights.
        spec: its input settings.
        volume: the dataset.
        own: which slices, how many tokens.
        model: hash of all weights.
        change: what to do to a slice, uint8, pixel by pixel before it is aligned and tiled.
        name: what to call the dataset after `change`.
    """
    geo = geometry_of(volume, spec, backbone.arch.patch, change)

    def tiles(z: int) -> Tiles:
        native = with_neighbours(volume, z, spec.context)
        image, label = (
            to_input(change(native) if change else native, geo),
            label_to_input(volume.label[z], geo),
        )
        (h, w), corners = geo.tile, geo.corners(0.0)
        batch = max(1, BATCH_TOKENS // math.prod(geo.grid))
        for start in range(0, len(corners), batch):
            now = corners[start : start + batch]
            images = torch.stack([as_input(image[y : y + h, x : x + w]) for y, x in now])
            tokens = compute_tokens(backbone, images, spec.precision)[-1].float().cpu().numpy()
            for (y, x), own_tokens in zip(now, tokens, strict=True):
                yield (y, x), own_tokens, label[y : y + h, x : x + w]

    settings = spec.model_dump(mode="json")
    for key in (
        "source",
        "file",
        "views",
        "overlap",
        "align",
        "reference",
        *([] if spec.context else ["context"]),
    ):
        settings.pop(key)
    identity = ["computed", model, settings, list(backbone.blocks), name]
    return _kept(volume, own, geo, name or volume.name, tiles, identity)


def pixel_features(
    spec: BackboneSettings,
    patch: int,
    volume: Volume,
    own: DiagnoseSettings,
    change: Callable[[Grey], Grey] | None = None,
    name: str = "",
) -> Features:
    """Grey values of each patch, in [0, 1], as its token (patch * patch values): what differs before any model looks."""
    geo = geometry_of(volume, spec, patch, change)

    def tiles(z: int) -> Tiles:
        native = np.asarray(volume.image[z])
        image, label = (
            to_input(change(native) if change else native, geo),
            label_to_input(volume.label[z], geo),
        )
        h, w = geo.tile
        for y, x in geo.corners(0.0):
            cells = _patches(
                image[y : y + h, x : x + w].astype(np.float32) / 255.0, geo
            )  # h,w,patch,patch
            yield (
                (y, x),
                cells.transpose(2, 3, 0, 1).reshape(patch * patch, *geo.grid),
                label[y : y + h, x : x + w],
            )

    shape = [list(geo.tile), list(geo.resized), list(geo.padded)]
    return _kept(volume, own, geo, name or volume.name, tiles, ["pixels", shape, patch, name])


def _kept(
    volume: Volume,
    spec: DiagnoseSettings,
    geo: Geometry,
    name: str,
    tiles: Callable[[int], Tiles],
    identity: Sequence[object],
) -> Features:
    """Read features from disk, or make them in one pass and keep them."""
    slices, parts = chosen_slices(volume, spec)
    if geo.aligner.facts:
        identity = [*identity, geo.aligner.facts]
    content = {
        "format": FORMAT,
        "identity": list(identity),
        "data": volume.md5,
        "slices": slices.tolist(),
        "tokens": spec.tokens,
        "seed": spec.seed,
    }
    folder = KEPT / digest(content)[:24]
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / f"{folder.name}.lock"):  # a stage of another regime may want the same
        if not (folder / "manifest.json").is_file():
            _pass(volume, slices, spec, geo, tiles, folder)
    arrays = {
        k: np.load(folder / f"{k}.npy")
        for k in ("count", "total", "tokens", "foreground", "at", "where")
    }
    moments = Moments(
        arrays["count"], arrays["total"], np.load(folder / "outer.npy", mmap_mode="r")
    )
    grids = {int(f.stem[5:]): np.load(f) for f in sorted(folder.glob("grid-*.npy"))}
    return Features(
        name,
        slices,
        parts,
        moments,
        arrays["tokens"],
        arrays["foreground"],
        arrays["at"],
        arrays["where"],
        grids,
        volume.labelled,
    )


def _pass(
    volume: Volume,
    slices: npt.NDArray[np.int64],
    spec: DiagnoseSettings,
    geo: Geometry,
    tiles: Callable[[int], Tiles],
    folder: Path,
) -> None:
    """One pass over the tokens of `slices`, written under a temporary name."""
    from rich.progress import track

    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    each = -(-spec.tokens // len(slices))
    counts, totals, outer = [], [], None
    sample: list[tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.int64], Floats]] = []
    for place, z in enumerate(track(slices, description=f"features {volume.name}")):
        tokens, occupancy, centres = _one_slice(tiles(int(z)), geo)
        if not np.isfinite(tokens).all():
            shutil.rmtree(temporary)
            bad = int((~np.isfinite(tokens)).any(1).sum())
            raise InputError(
                f"tokens of {volume.name}, slice {z}",
                found=f"{bad} of {len(tokens)} with NaN or infinite values",
                expected="finite tokens",
                do="Check the weights, remove scratch/tokens, run the tokens stage again.",
            )
        foreground = occupancy >= OCCUPANCY
        count, total, square = slice_moments(tokens, foreground)
        if outer is None:
            outer = new_array(temporary / "outer.npy", np.float64, (len(slices), *square.shape))
        counts.append(count)
        totals.append(total)
        outer[place] = square
        rng = np.random.default_rng([spec.seed, int(z)])  # the same places for every model
        drawn = np.sort(rng.choice(len(tokens), min(each, len(tokens)), replace=False))
        sample.append(
            (tokens[drawn], foreground[drawn], np.full(len(drawn), place), centres[drawn])
        )
        if place == _shown(len(slices)):
            h, w = (len(np.unique(centres[:, axis])) for axis in (0, 1))
            if h * w == len(tokens):
                np.save(
                    temporary / f"grid-{place}.npy", tokens.reshape(h, w, -1).astype(np.float16)
                )
    names = ("tokens", "foreground", "at", "where")
    for name, column in zip(names, zip(*sample, strict=True), strict=True):
        np.save(temporary / f"{name}.npy", np.concatenate(column))
    np.save(temporary / "count.npy", np.asarray(counts))
    np.save(temporary / "total.npy", np.asarray(totals))
    if outer is not None:
        outer.flush()
    write_json(temporary / "manifest.json", {"dataset": volume.name, "slices": slices.tolist()})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _shown(n_slices: int) -> int:
    """Place of the slice whose whole grid of tokens is kept for maps: one of the training slices near the first third."""
    return n_slices // 3


def _one_slice(tiles: Tiles, geo: Geometry) -> tuple[Floats, Floats, Floats]:
    """Tokens (n, D) of a slice, each place once and none in the padding; occupancy (n,); centres (n, 2); by y, then x.

    Where tiles overlap, each token comes from the tile in whose middle it lies.
    """
    found = list(tiles)
    edges = [
        _borders(sorted({corner[axis] for corner, _, _ in found}), geo.tile[axis])
        for axis in (0, 1)
    ]
    tokens, occupancy, centres = [], [], []
    for (y, x), grid, label in found:
        h, w = grid.shape[1:]
        cy, cx = (
            origin + 0.5 * geo.patch + np.arange(n) * geo.patch for origin, n in ((y, h), (x, w))
        )
        keep_y = (cy >= edges[0][y][0]) & (cy < edges[0][y][1]) & (cy < geo.resized[0])
        keep_x = (cx >= edges[1][x][0]) & (cx < edges[1][x][1]) & (cx < geo.resized[1])
        keep = np.outer(keep_y, keep_x)
        share = _patches(label, geo).mean((2, 3))
        tokens.append(grid.transpose(1, 2, 0)[keep])
        occupancy.append(share[keep].astype(np.float32))
        centres.append(np.stack(np.meshgrid(cy, cx, indexing="ij"), -1)[keep].astype(np.float32))
    merged = np.concatenate(centres)
    order = np.lexsort((merged[:, 1], merged[:, 0]))
    return np.concatenate(tokens)[order], np.concatenate(occupancy)[order], merged[order]


def _patches(tile: npt.NDArray[Any], geo: Geometry) -> npt.NDArray[Any]:
    """(H, W) -> (h, w, patch, patch): the pixels of each token, a view."""
    windows = np.lib.stride_tricks.sliding_window_view(tile, (geo.patch, geo.patch))
    return windows[:: geo.patch, :: geo.patch]


def _borders(corners: list[int], side: int) -> dict[int, tuple[float, float]]:
    """Along one axis: from where to where a tile is the one whose middle is nearest."""
    middles = [(a + b + side) / 2 for a, b in itertools.pairwise(corners)]
    lows, highs = [-np.inf, *middles], [*middles, np.inf]
    return {c: (low, high) for c, low, high in zip(corners, lows, highs, strict=True)}
