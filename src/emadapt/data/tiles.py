"""Slices as a model sees them: resized, padded, cut into overlapping tiles, and merged again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from emadapt.data.align import AS_IT_IS, Aligner, aligner_of
from emadapt.data.images import WHOLE
from emadapt.data.ingest import Volume
from emadapt.study.backbones import BackboneSettings

Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Geometry:
    """How slices of one shape enter one backbone. All sizes are (height, width) in pixels."""

    native: tuple[int, int]  # the slice
    resized: tuple[int, int]  # after `pixel_nm`, and `scale` or `longest_edge`
    padded: tuple[int, int]  # on the far sides, to at least a tile
    tile: tuple[int, int]  # through the backbone at once; sides are multiples of the patch
    overlap: float  # share of a tile that its neighbour covers too
    patch: int  # side of a token's patch
    aligner: Aligner = field(default=AS_IT_IS, compare=False)  # before the slice is resized

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a tile's tokens."""
        return self.tile[0] // self.patch, self.tile[1] // self.patch

    def corners(self, overlap: float | None = None) -> list[tuple[int, int]]:
        """Upper left corners (y, x) of evenly spaced tiles that cover the padded slice."""
        share = self.overlap if overlap is None else overlap
        axes = []
        for length, side in zip(self.padded, self.tile, strict=True):
            n = 1 + math.ceil((length - side) / max(1, int(side * (1 - share))))
            axes.append([round(c) for c in np.linspace(0, length - side, n)])
        return [(y, x) for y in axes[0] for x in axes[1]]


def geometry_of(volume: Volume, spec: BackboneSettings, patch: int) -> Geometry:
    """How a dataset's slices enter a model whose patch has `patch` pixels."""
    height, width = volume.image.shape[1:3]
    return geometry((height, width), spec, patch, aligner_of(volume, spec))


def geometry(
    native: tuple[int, int], spec: BackboneSettings, patch: int, aligner: Aligner = AS_IT_IS
) -> Geometry:
    """Work out sizes for slices of shape `native` and a backbone whose patch has `patch` pixels."""
    height, width = native
    if spec.longest_edge:
        # The reference floors each side to the patch; in integers, or 1022 may become 1021.99.
        height, width = (side * spec.longest_edge // max(native) for side in native)
        resized = (max(1, height // patch) * patch, max(1, width // patch) * patch)
    else:
        zoom_y, zoom_x = aligner.zoom
        height, width = round(height * spec.scale * zoom_y), round(width * spec.scale * zoom_x)
        resized = (max(1, height), max(1, width))
    whole = (math.ceil(resized[0] / patch) * patch, math.ceil(resized[1] / patch) * patch)
    side = max(patch, spec.tile // patch * patch)
    tile = (side, side) if spec.tile else whole
    padded = (max(resized[0], tile[0]), max(resized[1], tile[1]))
    return Geometry(native, resized, padded, tile, spec.overlap, patch, aligner)


def with_neighbours(volume: Volume, z: int, context: int) -> Grey:
    """Slice `z`, (Y, X), or with `context` 1 the slices below it, itself and above it, (Y, X, 3).

    At an end of a part (`train`, `test`, a volume of many) the one neighbour comes twice.
    Neighbours may be of another part of the split.
    """
    if not context:
        return np.asarray(volume.image[z])
    first, end = next(pair for pair in itertools.pairwise(volume.ends) if z < pair[1])
    return np.stack([volume.image[k] for k in around(z, first, end - 1)], -1)


def around(z: int, first: int, last: int) -> tuple[int, int, int]:
    """The slice below, itself and the one above; at an end the one neighbour comes twice."""
    below, above = max(z - 1, first), min(z + 1, last)
    return (below if z > first else above), z, (above if z < last else below)


def to_input(image: Grey, geo: Geometry) -> Grey:
    """(Y, X) native slice -> (H, W) aligned, resized and padded; of (Y, X, 3) each channel."""
    if image.ndim == 3:
        channels = (np.ascontiguousarray(image[..., k]) for k in range(image.shape[2]))
        return np.stack([to_input(channel, geo) for channel in channels], -1)
    return _pad(_resize(geo.aligner(image), geo.resized, Image.Resampling.BICUBIC), geo.padded)


def label_to_input(label: Grey, geo: Geometry) -> Grey:
    """(Y, X) native label -> (H, W), nearest neighbour, padded as the image.

    The one pixel that is the label of a whole image stays.
    """
    if label.shape == WHOLE:
        return label
    return _pad(_resize(label, geo.resized, Image.Resampling.NEAREST), geo.padded)


def _resize(array: Grey, size: tuple[int, int], how: Image.Resampling) -> Grey:
    if array.shape == size:
        return np.asarray(array)
    return np.asarray(Image.fromarray(np.asarray(array)).resize((size[1], size[0]), how))


def _pad(array: Grey, size: tuple[int, int]) -> Grey:
    missing = [(0, want - have) for want, have in zip(size, array.shape, strict=True)]
    return np.pad(array, missing, mode="symmetric") if any(m for _, m in missing) else array


def window_starts(length: int, side: int, share: float) -> list[int]:
    """Where windows of `side`, which overlap by `share`, begin on an axis, as MONAI's do."""
    step = max(1, int(side * (1 - share)))
    return [*range(0, length - side, step), length - side]


def merge_tiles(
    tiles: Iterable[npt.NDArray[np.float32]], corners: list[tuple[int, int]], geo: Geometry
) -> npt.NDArray[np.float32]:
    """Merge tiles (..., h, w), weighted towards their middles, to the padded slice (..., H, W)."""
    hann, rest = window(geo.tile), iter(tiles)
    first = next(rest)
    total = np.zeros((*first.shape[:-2], *geo.padded), np.float32)
    weight = np.zeros(geo.padded, np.float32)
    for tile, (y, x) in zip(itertools.chain([first], rest), corners, strict=True):
        place = np.s_[..., y : y + geo.tile[0], x : x + geo.tile[1]]
        total[place] += tile * hann
        weight[place] += hann
    return np.asarray(total / weight)


def to_native(probability: npt.NDArray[np.float32], geo: Geometry) -> npt.NDArray[np.float32]:
    """Probabilities (..., H, W) of the padded slice -> (..., Y, X) at the slice's resolution."""
    if probability.ndim > 2:
        return np.stack([to_native(own, geo) for own in probability])
    merged = probability[: geo.resized[0], : geo.resized[1]]
    if geo.resized == geo.native:
        return np.asarray(merged)
    resized = Image.fromarray(merged).resize(geo.native[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def window(tile: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Weight (h, w) of each pixel of a tile where tiles overlap, largest in its middle."""
    return np.outer(_hann(tile[0]), _hann(tile[1])).astype(np.float32)


def _hann(n: int) -> npt.NDArray[np.float64]:
    """Raised cosine that stays above zero, so that every pixel has a weight."""
    return np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 + 1e-3
