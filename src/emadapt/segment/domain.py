"""Is a volume like the data that a model was trained on? A look at tokens before hours of segmenting."""

from __future__ import annotations

from dataclasses import dataclass

from emadapt.errors import InputError
from emadapt.models.closest import shift, statistics_of
from emadapt.segment.job import TILES, Runner, spread_tiles

FAR = 3.0
"""A volume is unlike the training data where it is this many times as far away as the farthest validation slice: between what
a model of Lucchi finds on Lucchi's test slices and on VNC."""


@dataclass(frozen=True)
class Domain:
    """How far a volume's tokens are from those of each training dataset, see `emadapt.models.closest.shift`.

    Attributes:
        distances: by dataset.
        usual: by dataset, the distance of its validation slice that is farthest away.
    """

    distances: dict[str, float]
    usual: dict[str, float]

    @property
    def nearest(self) -> str:
        """The dataset that the volume is least unlike."""
        return min(
            self.distances, key=lambda name: self.distances[name] / max(self.usual[name], 1e-12)
        )

    @property
    def verdict(self) -> str:
        """`like` or `unlike`."""
        return (
            "like" if self.distances[self.nearest] <= FAR * self.usual[self.nearest] else "unlike"
        )

    def words(self) -> str:
        """The verdict as a sentence."""
        name = self.nearest
        poor = ": expect poor results" if self.verdict == "unlike" else ""
        return (
            f"The volume is {self.verdict} the data that the model was trained on{poor}. Its tokens are "
            f"{self.distances[name]:.3g} away from those of {name}, whose own validation slices are up to "
            f"{self.usual[name]:.3g} away."
        )


def domain_of_volume(runner: Runner) -> Domain:
    """Look at some tiles all over a volume.

    Raises:
        InputError: the model does not say what the tokens of its training data are like.
    """
    model = runner.model
    known = {name: own for name, own in model.card.get("tokens", {}).items() if own.get("usual")}
    if not known:
        raise InputError(
            model.folder / "model.json",
            found="no token statistics: a model of another version",
            expected="those of its training data",
            do="Train the unit again.",
        )
    tiles = spread_tiles(
        runner.source, runner.job.window, runner.geo, TILES, runner.model.segmenter.spec.context
    )
    found = statistics_of(model.segmenter, tiles.split(1))
    return Domain(
        {name: shift(found, own) for name, own in known.items()},
        {name: max(own["usual"]) for name, own in known.items()},
    )
