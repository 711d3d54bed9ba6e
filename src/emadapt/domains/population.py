"""What is compared of two datasets: all tokens, those of a class, or mean tokens of slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emadapt.data.splits import evenly_spaced
from emadapt.domains import frechet
from emadapt.domains.features import Features
from emadapt.domains.moments import CLASSES, z_blocks
from emadapt.errors import InputError

Numbers = npt.NDArray[np.int64]
Distance = Callable[[Numbers, Numbers], float]
FEWEST = 4
"""A class in fewer slices than this is not compared."""


@dataclass(frozen=True)
class Population:
    """What is compared of a dataset under a model.

    Attributes:
        features: of the dataset.
        level: "token" or "pixel" (all tokens of all slices), or "image" (one mean token per slice).
        cls: "all", "foreground" or "background"; of "image" only "all".
    """

    features: Features
    level: str
    cls: str

    @property
    def of_slices(self) -> bool:
        """Whether its members are slices, not tokens."""
        return self.level == "image"

    def count(self) -> int:
        """Number of members."""
        return len(self.features.slices) if self.of_slices else int(self._counts().sum())

    def places(self) -> Numbers:
        """Places of the slices that have members."""
        if self.of_slices:
            return np.arange(len(self.features.slices))
        return np.flatnonzero(self._counts() > 0)

    def variance(self) -> float:
        """Total variance of the members."""
        moments = self.features.moments
        if self.of_slices:
            return float(moments.slice_means().var(0, ddof=1).sum())
        return float(np.trace(moments.merged(np.arange(len(self.features.slices)), self.cls)[2]))

    def sampled(self) -> tuple[Numbers, Numbers]:
        """Tokens of the subsample that are members, and the places of their slices."""
        chosen = np.flatnonzero(np.isin(self.features.foreground, CLASSES[self.cls]))
        return chosen, self.features.at[chosen]

    def sample(self, most: int, blocks: int) -> tuple[npt.NDArray[np.float32], Numbers]:
        """At most so many members (n, D), and the z-block of each (n,).

        Blocks are of the slices that have members: one without any could not be held out.

        Raises:
            InputError: too few slices have members.
        """
        if self.of_slices:
            means = self.features.moments.slice_means().astype(np.float32)
            return means, z_blocks(len(means), blocks)
        chosen, at = self.sampled()
        slices, place = np.unique(at, return_inverse=True)
        if len(slices) < (least := blocks if self.cls == "all" else FEWEST):
            raise InputError(
                f"dataset {self.features.name}",
                found=f"{self.cls} tokens in {len(slices)} slices of the subsample",
                expected=f"in at least {least}",
                do="Raise `diagnose.slices` or `diagnose.tokens`, or look at its label rule.",
            )
        thin = evenly_spaced(len(chosen), most)
        block = z_blocks(len(slices), blocks)[place]
        return self.features.tokens[chosen[thin]], block[thin]

    def distance_to(self, other: Population) -> Distance:
        """Fréchet distance as a function of the slices that stand for each of the two."""
        a, b = self.features.moments, other.features.moments
        if self.of_slices:
            means_a, means_b = a.slice_means(), b.slice_means()
            return lambda i, j: frechet.frechet_samples(means_a[i], means_b[j])
        cls = self.cls
        return lambda i, j: frechet.frechet(*a.merged(i, cls)[1:], *b.merged(j, cls)[1:])

    def _counts(self) -> npt.NDArray[np.float64]:
        """Members in each slice, of tokens."""
        return np.asarray(self.features.moments.count[:, CLASSES[self.cls]].sum(1))
