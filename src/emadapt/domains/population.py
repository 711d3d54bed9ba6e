"""What is compared of two datasets: all tokens, or mean tokens of slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emadapt.data.splits import evenly_spaced
from emadapt.domains import frechet
from emadapt.domains.features import Features
from emadapt.domains.moments import z_blocks

Numbers = npt.NDArray[np.int64]
Distance = Callable[[Numbers, Numbers], float]


@dataclass(frozen=True)
class Population:
    """What is compared of a dataset under a model.

    Attributes:
        features: of the dataset.
        level: "token" or "pixel" (all tokens of all slices), or "image" (one mean token per slice).
    """

    features: Features
    level: str

    @property
    def of_slices(self) -> bool:
        """Whether its members are slices, not tokens."""
        return self.level == "image"

    def count(self) -> int:
        """Number of members."""
        moments = self.features.moments
        return len(moments.count) if self.of_slices else int(moments.count.sum())

    def places(self) -> Numbers:
        """Places of the slices that have members."""
        return np.flatnonzero(self.features.moments.count > 0)

    def variance(self) -> float:
        """Total variance of the members."""
        moments = self.features.moments
        if self.of_slices:
            return float(moments.slice_means().var(0, ddof=1).sum())
        return float(np.trace(moments.merged(self.places())[2]))

    def sample(self, most: int, blocks: int) -> tuple[npt.NDArray[np.float32], Numbers]:
        """At most so many members (n, D), and the z-block of each (n,).

        Blocks are of the slices that have members: one without any could not be held out.
        """
        if self.of_slices:
            means = self.features.moments.slice_means().astype(np.float32)
            return means, z_blocks(len(means), blocks)
        thin = evenly_spaced(len(self.features.tokens), most)
        slices, place = np.unique(self.features.at, return_inverse=True)
        return self.features.tokens[thin], z_blocks(len(slices), blocks)[place[thin]]

    def distance_to(self, other: Population) -> Distance:
        """Fréchet distance as a function of the slices that stand for each of the two."""
        a, b = self.features.moments, other.features.moments
        if self.of_slices:
            means_a, means_b = a.slice_means(), b.slice_means()
            return lambda i, j: frechet.frechet_samples(means_a[i], means_b[j])
        return lambda i, j: frechet.frechet(*a.merged(i)[1:], *b.merged(j)[1:])
