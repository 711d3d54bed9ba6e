"""Batches of training samples, a function of the seed alone, so that runs resume exactly.

A sample is drawn from one of several datasets. Datasets with slices of different shapes give a
batch of several groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from emadapt.study.training import TrainSettings

Item = tuple[Any, torch.Tensor]
"""Inputs (an image, or what is cached of it) and labels, of a sample or stacked."""
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of the inputs and the labels of a sample


@dataclass(frozen=True)
class Draw:
    """A training sample: dataset number, row (a slice or a tile), seed of its augmentation."""

    member: int
    row: int
    seed: int


class Samples(Protocol):
    """What training draws from: image crops, blocks of slices, or cached tokens.

    Datasets without labels are numbered after the others; their items have zeros as labels.

    Attributes:
        on_device: whether items are on the GPU already.
    """

    on_device: bool

    def rows(self) -> list[npt.NDArray[np.int64]]:
        """Per labelled dataset, the rows that may be drawn."""

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        """Per unlabelled dataset, the rows that may be drawn."""

    def beside(self, draw: Draw, step: int) -> Draw:
        """The same place `step` slices on, or the draw itself where there is none."""

    def shapes(self, member: int) -> Shapes:
        """Shapes of the items of a dataset."""

    def __getitem__(self, draw: Draw) -> Item:
        """Inputs, and labels int64 of class ids and `IGNORE`."""


def plan_epoch(
    rows: Sequence[npt.NDArray[np.int64]], spec: TrainSettings, seed: int, epoch: int
) -> list[list[Draw]]:
    """The batches of one epoch, a function of its arguments alone.

    Args:
        rows: per dataset, the rows that may be drawn.
        spec: `steps_per_epoch` batches of `batch` samples (at least one a dataset), or with 0 one
            pass over all rows; `balanced` draws datasets equally often, so small ones repeat.
        seed: the unit's seed.
        epoch: its number, from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    pool = [(m, int(r)) for m, own in enumerate(rows) for r in own]
    size = max(spec.batch, len(rows))
    total = spec.steps_per_epoch * size or len(pool)
    if spec.sampling == "balanced" and len(rows) > 1:
        cycles = [cycle(np.asarray(own), -(-total // len(rows)), rng) for own in rows]
        chosen = [(i % len(rows), int(cycles[i % len(rows)][i // len(rows)])) for i in range(total)]
    else:
        chosen = [pool[i] for i in cycle(np.arange(len(pool)), total, rng)]
    seeds = rng.integers(2**31, size=total)
    draws = [Draw(m, r, int(s)) for (m, r), s in zip(chosen, seeds, strict=True)]
    return [draws[i : i + size] for i in range(0, total, size)]


def cycle(values: npt.NDArray[np.int64], n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`n` values: permutations one after the other, so none comes twice before all came once."""
    rounds = [rng.permutation(values) for _ in range(-(-n // len(values)))]
    return np.concatenate(rounds)[:n]


def load_epoch(samples: Samples, batches: list[list[Draw]], workers: int) -> Iterable[list[Item]]:
    """An epoch's batches; each is a list of groups of equal shape, stacked (inputs, labels).

    A step waits for nothing on the GPU. So while it works on one batch, the next one is read and
    copied, from pinned memory.
    """
    if samples.on_device:
        return (_group([samples[draw] for draw in batch]) for batch in batches)
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_group,
        pin_memory=torch.cuda.is_available(),
    )


def deal(samples: Samples, batch: list[Draw], rank: int, size: int) -> list[Draw]:
    """The part of a batch that falls to process `rank`; equal shapes are shared out evenly."""
    return sorted(batch, key=lambda draw: samples.shapes(draw.member))[rank::size]


def with_absent(samples: Samples, batch: list[Draw], own: list[Item]) -> list[Item]:
    """A process's groups, and an empty one for each shape that only others have, in batch order."""
    have = {tuple(inputs.shape[1:]): (inputs, labels) for inputs, labels in own}
    shapes = dict.fromkeys(samples.shapes(draw.member) for draw in batch)
    return [
        have.get(i) or (torch.zeros((0, *i)), torch.zeros((0, *lab), dtype=torch.int64))
        for i, lab in shapes
    ]


def members_of(samples: Samples, draws: Sequence[Draw]) -> list[list[int]]:
    """Dataset number of each sample of each group, in the order of `load_epoch`'s groups."""
    groups: dict[Any, list[int]] = {}
    for draw in draws:
        groups.setdefault(samples.shapes(draw.member)[0], []).append(draw.member)
    return list(groups.values())


def _group(items: list[Item]) -> list[Item]:
    """Stack what fits together: whole slices of two datasets have two shapes."""
    shapes: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        shapes.setdefault(tuple(item[0].shape), []).append(item)
    return [
        (_stack([inputs for inputs, _ in group]), torch.stack([label for _, label in group]))
        for group in shapes.values()
    ]


def _stack(inputs: list[Any]) -> Any:
    """Tensors, or something else that knows how to stack itself."""
    return getattr(type(inputs[0]), "stack", torch.stack)(inputs)
