"""Is a volume like the data that a model was trained on? Ask before hours of segmenting."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emadapt.data.splits import evenly_spaced
from emadapt.models.token_statistics import shift, statistics_of
from emadapt.segment.runner import Runner

SLICES, TILES = 8, 48
"""Slices and tiles of a volume that are looked at."""
FAR = 3.0
"""A volume is unlike the training data if it is this many times as far away as the farthest
validation slice. Between what a model of Lucchi finds on Lucchi's test slices and on VNC."""


@dataclass(frozen=True)
class Domain:
    """How far a volume's tokens are from those of each training dataset, see `shift`.

    Attributes:
        distances: by dataset.
        usual: by dataset, the distance of its validation slice that is farthest away.
    """

    distances: dict[str, float]
    usual: dict[str, float]

    @property
    def nearest(self) -> str:
        """The dataset that the volume resembles most."""
        return min(self.distances, key=lambda name: self.distances[name] / (self.usual[name] or 1))

    @property
    def verdict(self) -> str:
        """`like` or `unlike`."""
        near = self.distances[self.nearest] <= FAR * self.usual[self.nearest]
        return "like" if near else "unlike"

    def words(self) -> str:
        """The verdict in two sentences."""
        name = self.nearest
        poor = ": expect poor results" if self.verdict == "unlike" else ""
        return (
            f"The volume is {self.verdict} the data that the model was trained on{poor}. "
            f"Its distance to {name} is {self.distances[name]:.3g}; "
            f"validation slices of {name} have up to {self.usual[name]:.3g}."
        )


def domain_of_volume(runner: Runner) -> Domain:
    """Compare the tokens of some tiles all over a volume with those of the training data."""
    known = runner.model.card["tokens"]
    found = statistics_of(runner.model.segmenter, spread_tiles(runner).split(1))
    return Domain(
        {name: shift(found, own) for name, own in known.items()},
        {name: max(own["usual"]) for name, own in known.items()},
    )


def spread_tiles(runner: Runner) -> torch.Tensor:
    """About `TILES` tiles of a volume, from other places in each slice; (n, 1 or 3, h, w)."""
    slices, corners = evenly_spaced(runner.job.shape[0], SLICES), runner.geo.corners(0.0)
    tiles = []
    for i, z in enumerate(slices):
        own = corners[i :: len(slices)] or [corners[i % len(corners)]]
        some = [own[k] for k in evenly_spaced(len(own), TILES // len(slices))]
        tiles.append(runner.tiles(z, some))
    return torch.cat(tiles)
