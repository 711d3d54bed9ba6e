"""A volume beside the data that a model was trained on, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emadapt.data.splits import evenly_spaced
from emadapt.models.token_statistics import (
    both_ways,
    grey_of,
    polarity_of,
    shift,
    statistics_of,
)
from emadapt.segment.runner import Runner
from emadapt.volumes.voxel import Voxel, said

SLICES, TILES = 8, 16
"""Slices and tiles of a volume that are looked at."""
CLEAR = 0.4
"""Polarity from which a volume is as in training, or inverted. Crops of 512 pixels of the EPFL
hippocampus and of the VNC have 0.48 to 1.08 for models of either."""
FEW = 4
"""With fewer tiles in a slice, a low polarity proves nothing: a crop of 112 pixels had -0.73."""
MANY = 5.0
"""A volume of unclear polarity is probably inverted if an inverted one has so many times as much
foreground."""
INVERTED = "The contrast is probably inverted: exchange black and white of the volume, and compare."


@dataclass(frozen=True)
class Domain:
    """Figures of a volume, and of each training dataset by its name.

    Attributes:
        voxel_nm, trained_nm: voxel sizes (z, y, x).
        tiles: that cover a slice.
        grey, trained_grey: 5th, 50th and 95th percentile of what the model sees, 0 to 255.
        polarity: 1: black and white as in that dataset; -1: exchanged; empty without a backbone.
        found, trained_found: shares of foreground as it is, and with black and white exchanged.
        distances: of tokens, see `shift`; `usual` has the least and the most of its validation
            slices.
    """

    voxel_nm: Voxel
    trained_nm: dict[str, Voxel]
    tiles: int
    grey: list[float]
    trained_grey: dict[str, list[float]]
    polarity: dict[str, float]
    found: tuple[float, float]
    trained_found: dict[str, Sequence[float]]
    distances: dict[str, float]
    usual: dict[str, tuple[float, float]]

    @property
    def nearest(self) -> str:
        """The dataset that the volume resembles most, by distances in units of its own."""
        return min(
            self.distances, key=lambda name: self.distances[name] / (self.usual[name][1] or 1)
        )

    @property
    def inverted(self) -> bool:
        """Whether black and white are probably exchanged."""
        if not self.polarity:
            return False
        polarity, (own, other) = self.polarity[self.nearest], self.found
        usual, exchanged = self.trained_found[self.nearest]
        more = max(1.0, exchanged / max(usual, 1e-3)) * MANY
        shown = polarity <= -CLEAR and self.tiles >= FEW
        return shown or (polarity < CLEAR and other > more * max(own, 1e-3))

    def figures(self) -> dict[str, str]:
        """By what they are of; the volume first, then the training data."""
        trained = {
            "voxel size": {name: said(voxel) for name, voxel in self.trained_nm.items()},
            "grey values": {name: _levels(grey) for name, grey in self.trained_grey.items()},
            "foreground": {name: _shares(found) for name, found in self.trained_found.items()},
        }
        own = {
            "voxel size": f"{said(self.voxel_nm)} nm (z y x)",
            "grey values": f"{_levels(self.grey)} (5, 50, 95 %)",
        }
        if self.polarity:
            own["foreground"] = f"{_shares(self.found)} with black and white exchanged"
        rows = {
            name: "; ".join([value, *(f"{key} {v}" for key, v in trained[name].items())])
            for name, value in own.items()
        }
        rows["token distance"] = "; ".join(
            f"{away:.3g} from {name}, whose validation slices have "
            f"{self.usual[name][0]:.3g} to {self.usual[name][1]:.3g}"
            for name, away in self.distances.items()
        )
        if self.polarity:
            against = (f"{value:.2f} against {name}" for name, value in self.polarity.items())
            rows["polarity"] = f"{', '.join(against)} (1 as there, -1 exchanged, near 0 unclear)"
        return rows

    def words(self) -> str:
        """A line for each figure; last, whether the contrast is inverted."""
        lines = [f"{name}: {value}" for name, value in self.figures().items()]
        return "\n".join(lines + [INVERTED] * self.inverted)


def _levels(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values) or "none"


def _shares(pair: Sequence[float]) -> str:
    return f"{pair[0]:.1%}, {pair[1]:.1%}"


def domain_of_volume(runner: Runner) -> Domain:
    """Compare some tiles all over a volume with the training data."""
    segmenter, known = runner.model.segmenter, runner.model.card["tokens"]
    tiles = spread_tiles(runner)
    tokens = statistics_of(segmenter, tiles.split(1))
    polarity, found = {}, (0.0, 0.0)
    if told := {name: own for name, own in known.items() if "polarity" in own}:
        seen = both_ways(segmenter, tiles)
        polarity = {name: polarity_of(*seen, own["polarity"]) for name, own in told.items()}
        found = seen[0][1], seen[1][1]
    return Domain(
        voxel_nm=runner.job.voxel_nm,
        trained_nm=runner.model.voxels,
        tiles=len(runner.geo.corners(0.0)),
        grey=grey_of(tiles),
        trained_grey={name: own["grey"] for name, own in known.items() if "grey" in own},
        polarity=polarity,
        found=found,
        trained_found={name: own["found"] for name, own in told.items()},
        distances={name: shift(tokens, own) for name, own in known.items()},
        usual={name: (min(own["usual"]), max(own["usual"])) for name, own in known.items()},
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
