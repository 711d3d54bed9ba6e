"""Training samples from the token cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from emadapt.data.batches import Draw, Item, Shapes
from emadapt.models.tokens import TokenView


class TokenDataset(Dataset[Item]):
    """Cached tokens of training slices; `draw.row` counts through a dataset's views.

    Args:
        views: per dataset.
        unlabelled: views of datasets whose labels are not read (their items have zeros), numbered
            after the others.
    """

    def __init__(
        self,
        views: Sequence[Sequence[TokenView]],
        unlabelled: Sequence[Sequence[TokenView]] = (),
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

    def rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(places)) for places in self.places[: self.n_labelled]]

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(places)) for places in self.places[self.n_labelled :]]

    def beside(self, draw: Draw, step: int) -> Draw:
        view, row = self.places[draw.member][draw.row]
        z, y, x = view.index[row].tolist()  # of an augmented crop y and x are -1
        found = self.plain[draw.member].get((z + step, y, x), draw.row) if y >= 0 else draw.row
        return dataclasses.replace(draw, row=found)

    def shapes(self, member: int) -> Shapes:
        view = self.views[member][0]
        return view.tokens.shape[1:], view.labels.shape[1:]

    def __getitem__(self, draw: Draw) -> Item:
        """What the view has of a tile, and (H, W) int64 labels."""
        view, row = self.places[draw.member][draw.row]
        label = np.zeros(view.labels.shape[1:], np.uint8)
        if draw.member < self.n_labelled:
            label = np.array(view.labels[row])
        return view.read(row), torch.from_numpy(label.astype(np.int64))
