"""Training samples from the token cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from emadapt.data.batches import Draw, Item, Shapes
from emadapt.models.device import device, free_bytes
from emadapt.models.tokens import TokenView

SHARE = 0.25
"""Of the GPU's free memory that cached samples may take. Several units may train on one GPU."""


class TokenDataset(Dataset[Item]):
    """Cached tokens of training slices; `draw.row` counts through a dataset's views.

    They are copied to the GPU once if they take less than `SHARE` of its free memory.

    Args:
        views: per dataset.
        unlabelled: views of datasets whose labels are not read (their items have zeros), numbered
            after the others.
    """

    def __init__(
        self, views: Sequence[Sequence[TokenView]], unlabelled: Sequence[Sequence[TokenView]] = ()
    ) -> None:
        self.views, self.n_labelled = [*views, *unlabelled], len(views)
        self.places = [
            [(view, int(row)) for view in own for row in view.rows_of("train")]
            for own in self.views
        ]
        self.plain = [
            {tuple(view.index[row].tolist()): i for i, (view, row) in enumerate(places)}
            for places in self.places
        ]
        places = [(m, row) for m, own in enumerate(self.places) for row in range(len(own))]
        self.held: dict[tuple[int, int], Item] = {}
        if sum(self._bytes(*place) for place in places) < SHARE * free_bytes():
            for place in places:
                inputs, label = self._read(*place)
                self.held[place] = inputs.to(device()), label.to(device())
        self.on_device = bool(self.held)

    def rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(places)) for places in self.places[: self.n_labelled]]

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(places)) for places in self.places[self.n_labelled :]]

    def beside(self, draw: Draw, step: int) -> Draw:
        view, row = self.places[draw.member][draw.row]
        z, y, x = view.index[row].tolist()  # of an augmented crop y and x are -1
        there = y >= 0 and max(z, z + step) not in view.ends
        found = self.plain[draw.member].get((z + step, y, x), draw.row) if there else draw.row
        return dataclasses.replace(draw, row=found)

    def shapes(self, member: int) -> Shapes:
        view = self.views[member][0]
        return view.tokens.shape[1:], view.labels.shape[1:]

    def __getitem__(self, draw: Draw) -> Item:
        """What the view has of a tile, and (H, W) int64 labels."""
        place = draw.member, draw.row
        inputs, label = self.held.get(place) or self._read(*place)
        return inputs, label.long()

    def _read(self, member: int, number: int) -> Item:
        """What the view has of a tile, and (H, W) uint8 labels."""
        view, row = self.places[member][number]
        label = np.zeros(view.labels.shape[1:], np.uint8)
        if member < self.n_labelled:
            label = np.array(view.labels[row])
        return view.read(row), torch.from_numpy(label)

    def _bytes(self, member: int, number: int) -> int:
        view, row = self.places[member][number]
        arrays = (view.tokens, view.labels, view.entering)
        return sum(array[row].nbytes for array in arrays if array is not None)
