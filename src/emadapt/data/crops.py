"""What training draws: augmented image crops, or rows of the token cache.

The draw depends on the seed alone, so runs resume exactly.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from emadapt.data.ingest import Volume
from emadapt.data.labelled import Tile
from emadapt.data.prepared import PreparedSlices
from emadapt.data.tiles import Grey, geometry_of, label_to_input
from emadapt.study.study import BackboneSettings, TrainSettings

if TYPE_CHECKING:
    from emadapt.data.blocks import PatchDataset
    from emadapt.models.tokens import TokenView

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # it asks the network for its version at import


@dataclass(frozen=True)
class Cached:
    """What the token cache has of a tile, or of a batch of them (then with a leading axis), where tokens alone are not enough.

    Attributes:
        tokens: (blocks * D, h, w) float16 of the blocks that are cached.
        entering: (N, D) float16, what enters the first adapted block; None where all blocks are cached.
        image: (1 or 3, H, W) float32 in [0, 1]; None where the head does not look at it.
    """

    tokens: torch.Tensor
    entering: torch.Tensor | None = None
    image: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the tokens."""
        return self.tokens.shape

    def to(self, device: torch.device) -> Cached:
        """The same on another device."""
        return Cached(
            self.tokens.to(device),
            *(p if p is None else p.to(device) for p in (self.entering, self.image)),
        )

    def pick(self, samples: torch.Tensor) -> Cached:
        """Some samples of a batch, by number or mask."""
        return Cached(
            self.tokens[samples],
            *(p if p is None else p[samples] for p in (self.entering, self.image)),
        )

    @staticmethod
    def stack(items: Sequence[Cached]) -> Cached:
        """A batch."""
        parts = [
            [p for i in items if (p := getattr(i, name)) is not None]
            for name in ("entering", "image")
        ]
        return Cached(
            torch.stack([i.tokens for i in items]), *(torch.stack(p) if p else None for p in parts)
        )


Inputs = torch.Tensor | Cached
"""Images (1 or 3, H, W), cached tokens (blocks * D, h, w), or more of what is cached."""
Item = tuple[Any, torch.Tensor]
"""`Inputs` and labels, of a sample or stacked."""
Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of the inputs and the labels of a sample."""


@dataclass(frozen=True)
class Draw:
    """One training sample: dataset number, row (a slice, or a cached tile), and the seed of its crop and augmentation."""

    member: int
    row: int
    seed: int


@functools.cache
def _augmentation() -> Any:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # OpenCV's own threads get in the way of forked workers
    return A.Compose(
        [
            A.D4(p=1.0),
            A.ElasticTransform(
                alpha=40, sigma=8, approximate=True, border_mode=cv2.BORDER_REFLECT_101, p=0.3
            ),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.25, p=0.8),
        ]
    )


def augment(image: Grey, label: Grey, seed: int) -> tuple[Grey, Grey]:
    """Flip, rotate by 90 degrees, mild elastic, brightness and contrast; the same for the same seed in any process."""
    compose = _augmentation()
    compose.set_random_seed(seed)  # per sample: forked workers would otherwise repeat each other
    out = compose(image=np.ascontiguousarray(image), mask=np.ascontiguousarray(label))
    return out["image"], out["mask"]


def crop(
    image: Grey, label: Grey, tile: tuple[int, int], seed: int, augmented: bool
) -> tuple[Grey, Grey]:
    """A tile at a random place of a padded slice, augmented or not.

    Args:
        image: (H, W) or (H, W, 3) padded slice, as `tiles.to_input` gives it.
        label: (H, W) of 0 and 1.
        tile: (h, w), at most (H, W).
        seed: of the place and the augmentation.
        augmented: whether to augment.
    """
    rng = np.random.default_rng(seed)
    y, x = (
        int(rng.integers(0, have - want + 1)) for have, want in zip(label.shape, tile, strict=True)
    )
    image, label = image[y : y + tile[0], x : x + tile[1]], label[y : y + tile[0], x : x + tile[1]]
    return augment(image, label, int(rng.integers(2**31))) if augmented else (image, label)


class CropDataset(Dataset[Item]):
    """Image crops of the training slices of one or several volumes; items are drawn by `Draw`.

    Args:
        volumes: their training slices are what is drawn from.
        spec: input settings.
        patch: of the backbone.
        augmented: whether to augment.
        tiles: per volume, the tiles that are labelled and that `Draw.row` counts through; empty: a row is a slice.
        unlabelled: volumes whose labels are not read (their items have zeros), numbered after the others; a row is a slice.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        spec: BackboneSettings,
        patch: int,
        augmented: bool,
        tiles: Sequence[Sequence[Tile]] = (),
        unlabelled: Sequence[Volume] = (),
    ) -> None:
        self.volumes, self.augmented, self.tiles, self.n_labelled = (
            [*volumes, *unlabelled],
            augmented,
            tiles,
            len(volumes),
        )
        self.context = spec.context
        self.geos = [geometry_of(v, spec, patch) for v in self.volumes]
        self.slices = [
            PreparedSlices(v, geo, spec.context)
            for v, geo in zip(self.volumes, self.geos, strict=True)
        ]

    def rows(self) -> list[npt.NDArray[np.int64]]:
        """Per labelled volume, the rows that may be drawn: its training slices, or numbers of its labelled tiles."""
        if self.tiles:
            return [np.arange(len(own)) for own in self.tiles]
        return [np.asarray(v.split["train"]) for v in self.volumes[: self.n_labelled]]

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        """Per unlabelled volume, its training slices."""
        return [np.asarray(v.split["train"]) for v in self.volumes[self.n_labelled :]]

    def shapes(self, member: int) -> Shapes:
        """Of an item's inputs and labels."""
        tile = self.geos[member].tile
        return (3 if self.context else 1, *tile), tile

    def __getitem__(self, draw: Draw) -> Item:
        """(1, h, w) float32 in [0, 1], of a backbone with `context` (3, h, w), and (h, w) int64."""
        volume, geo = self.volumes[draw.member], self.geos[draw.member]
        labelled = draw.member < self.n_labelled
        z, *corner = self.tiles[draw.member][draw.row] if self.tiles and labelled else (draw.row,)
        image = self.slices[draw.member][z]
        label = (
            label_to_input(volume.label[z], geo)
            if labelled
            else np.zeros(image.shape[:2], np.uint8)
        )
        if corner:
            y, x = corner
            image, label = (a[y : y + geo.tile[0], x : x + geo.tile[1]] for a in (image, label))
        image, label = crop(image, label, geo.tile, draw.seed, self.augmented)
        return as_input(image), torch.from_numpy(label.astype(np.int64))


class TokenDataset(Dataset[Item]):
    """Cached tokens of the training slices; `draw.row` counts through the views of a dataset one after the other.

    Args:
        views: per volume.
        with_image: whether the head looks at the image, too.
        unlabelled: views of volumes whose labels are not read (their items have zeros), numbered after the others.
    """

    def __init__(
        self,
        views: Sequence[Sequence[TokenView]],
        with_image: bool = False,
        unlabelled: Sequence[Sequence[TokenView]] = (),
    ) -> None:
        self.views, self.with_image, self.n_labelled = [*views, *unlabelled], with_image, len(views)
        self.places = [
            [(view, int(row)) for view in own for row in view.rows_of("train")]
            for own in self.views
        ]

    def rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(places)) for places in self.places[: self.n_labelled]]

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(places)) for places in self.places[self.n_labelled :]]

    def shapes(self, member: int) -> Shapes:
        view = self.views[member][0]
        return view.tokens.shape[1:], view.labels.shape[1:]

    def __getitem__(self, draw: Draw) -> Item:
        """What the view has of a tile, and (H, W) int64 labels."""
        view, row = self.places[draw.member][draw.row]
        label = (
            np.array(view.labels[row])
            if draw.member < self.n_labelled
            else np.zeros(view.labels.shape[1:])
        )
        return view.read(row, self.with_image), torch.from_numpy(label.astype(np.int64))


def as_input(image: Grey) -> torch.Tensor:
    """(..., h, w) uint8 -> (..., 1, h, w) float32 in [0, 1]; with neighbouring slices (..., h, w, 3) -> (..., 3, h, w)."""
    scaled = torch.from_numpy(image.astype(np.float32)).div_(255.0)
    return (
        scaled.movedim(-1, -3) if image.shape[-1] == 3 else scaled.unsqueeze(-3)
    )  # no tile is 3 pixels wide


def plan_epoch(
    rows: Sequence[npt.NDArray[np.int64]], spec: TrainSettings, seed: int, epoch: int
) -> list[list[Draw]]:
    """The batches of one epoch, a function of its arguments alone.

    Args:
        rows: per dataset, the rows that may be drawn.
        spec: `steps_per_epoch` batches of `batch` samples (at least one a dataset), or with 0 one pass over all rows;
            `balanced` draws datasets equally often whatever their size (so a small one repeats within a pass).
        seed: the unit's seed.
        epoch: its number, from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    pool = [(m, int(r)) for m, own in enumerate(rows) for r in own]
    size = max(spec.batch, len(rows))
    total = spec.steps_per_epoch * size or len(pool)
    if spec.balanced and len(rows) > 1:
        cycles = [
            cycle(np.asarray([int(r) for r in own]), -(-total // len(rows)), rng) for own in rows
        ]
        chosen = [(i % len(rows), int(cycles[i % len(rows)][i // len(rows)])) for i in range(total)]
    else:
        chosen = [pool[i] for i in cycle(np.arange(len(pool)), total, rng)]
    draws = [
        Draw(m, r, int(s))
        for (m, r), s in zip(chosen, rng.integers(2**31, size=total), strict=True)
    ]
    return [draws[i : i + size] for i in range(0, total, size)]


def cycle(values: npt.NDArray[np.int64], n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`n` values: whole permutations one after the other, so that none is drawn twice before all were once."""
    rounds = [rng.permutation(values) for _ in range(-(-n // len(values)))]
    return np.concatenate(rounds)[:n]


def load_epoch(
    dataset: CropDataset | TokenDataset | PatchDataset, batches: list[list[Draw]], workers: int
) -> DataLoader[list[Item]]:
    """Iterate over an epoch's batches; a batch is a list of groups of equal shape, each a stacked (inputs, labels)."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_group)  # type: ignore[arg-type]


def deal(
    dataset: CropDataset | TokenDataset | PatchDataset, batch: list[Draw], rank: int, size: int
) -> list[Draw]:
    """What process `rank` of `size` takes of a batch; together they take all of it, and equal shapes are shared out evenly."""
    return sorted(batch, key=lambda draw: dataset.shapes(draw.member))[rank::size]


def with_absent(
    dataset: CropDataset | TokenDataset | PatchDataset, batch: list[Draw], own: list[Item]
) -> list[Item]:
    """The groups of a process, and an empty one for each shape that only others have, in the order of the whole batch."""
    have = {tuple(inputs.shape[1:]): (inputs, labels) for inputs, labels in own}
    shapes = dict.fromkeys(dataset.shapes(draw.member) for draw in batch)
    return [
        have.get(i) or (torch.zeros((0, *i)), torch.zeros((0, *lab), dtype=torch.int64))
        for i, lab in shapes
    ]


def _group(items: list[Item]) -> list[Item]:
    """Whole slices of two datasets have two shapes: stack what fits together."""
    shapes: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        shapes.setdefault(tuple(item[0].shape), []).append(item)
    return [
        (_stack([i for i, _ in g]), torch.stack([lab for _, lab in g])) for g in shapes.values()
    ]


def _stack(inputs: list[Inputs]) -> Inputs:
    """Of one kind."""
    return Cached.stack(inputs) if isinstance(inputs[0], Cached) else torch.stack(inputs)  # type: ignore[arg-type]
