"""A look at the values of a dataset's labels: which of them does its rule misread?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from emadapt.data.foreground import RARE
from emadapt.errors import InputError
from emadapt.study.datasets import DatasetSettings
from emadapt.volumes.source import Array

Floats = npt.NDArray[np.float64]
PIXELS = 2**20
"""Of a slice, in which values are counted."""
CLASSES = 8
"""Ids of classes are 1 to at most this one."""
IGNORE_LIKE = (127, 128, 255, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)
"""Values that tools use for what nobody knows, beside classes or beside 255."""
OFFSETS = (2**7, 2**15, 2**31)
"""What is added to signed values that are stored as unsigned ones, as ImageJ does."""
MOST = 0.9
"""Share of foreground that few structures have; labels with black and white exchanged do."""


class LabelValues:
    """Counts of label values under the settings of a dataset; whole ones, fractions are rounded."""

    def __init__(self, spec: DatasetSettings) -> None:
        self.spec = spec
        self.values, self.counts = np.empty(0), np.empty(0, np.int64)

    def add(self, label: Array) -> None:
        """Count the values of a slice (Y, X), of large ones on a grid. 1 bit has no ids."""
        if label.dtype == bool:
            return
        step = math.ceil(math.sqrt(label.size / PIXELS))
        values, counts = np.unique(np.round(label[::step, ::step]), return_counts=True)
        self.values, places = np.unique(np.append(self.values, values), return_inverse=True)
        self.counts = np.bincount(places, np.append(self.counts, counts)).astype(np.int64)

    def check(self, what: str) -> list[str]:
        """Lines on what is odd but can be meant.

        Raises:
            InputError: negative values, signed ones stored as unsigned, no background, or a value
                that looks like `ignore`.
        """
        rule, ignore = self.spec.rule, self.spec.ignore
        known = ~np.isin(self.values, ignore)
        if not known.any():
            return []
        values = self.values[known]
        above = values > float(rule[1:]) if isinstance(rule, str) else np.isin(values, rule)
        ids = () if isinstance(rule, str) else rule
        named = {*ids, *(value for own in self.spec.classes.values() for value in own)}
        others = values[~np.isin(values, [0, *named])]
        if (negative := others[others < 0]).size:
            raise InputError(
                what,
                found=f"negative label values: {self._said(negative)}",
                expected="0 in the background, and ids from 1 on",
                do="Ids too large for a signed type come out negative: save the labels as unsigned "
                "16 or 32 bits. If nobody knows what is there, set `ignore` of the dataset.",
            )
        lowest = next((value for value in values if value), 0)
        if lowest in OFFSETS and lowest in others and (lowest > 128 or 0 not in values):
            raise InputError(
                what,
                found=f"label values from {lowest:g} on: {self._said(values[:4])}",
                expected="0 in the background",
                do=f"These are signed values with {lowest:g} added, as ImageJ saves them: subtract "
                "it, or save the labels as unsigned from the start.",
            )
        if above.all():
            raise InputError(
                what,
                found=f"no background: {self._said(values)}, all foreground under {rule}",
                expected="some voxels of both",
                do="Name the ids that are foreground: `foreground: [ID, ...]`.",
            )
        for value in self._like_ignored(others):
            raise InputError(
                what,
                found=f"label values {self._said(values[values != 0])}",
                expected=f"to know what {value:g} means",
                do=f"If nobody knows what is there, set `ignore: [{value:g}]` of the dataset. Else "
                f"name the ids: `foreground: [...]`, or {value:g} in `classes`.",
            )
        lines = []
        if (full := self._share(values[above]) / self._share(values)) > MOST:
            lines.append(f"foreground is {100 * full:.3g} % of the labelled voxels")
        if named and others.size:
            lines.append(f"background by your settings: label values {self._said(others)}")
        if missing := sorted(set(ignore) - set(self.values)):
            lines.append(f"no voxel has the values {missing} of `ignore`")
        return lines

    def _like_ignored(self, others: Floats) -> Sequence[float]:
        """Values that nobody named, beside classes, or halfway between 0 and 255."""
        shares = self.counts / self.counts.sum()
        common = set(self.values[(self.values > 0) & (shares >= RARE)]) - set(self.spec.ignore)
        ids, like = common - set(IGNORE_LIKE), sorted(common & set(IGNORE_LIKE) & set(others))
        if not ids:  # a mask has one such value
            return like[:-1]
        return like if ids <= set(range(1, CLASSES + 1)) else []

    def _share(self, values: Iterable[float]) -> float:
        chosen = np.isin(self.values, list(values))
        return float(self.counts[chosen].sum() / self.counts.sum())

    def _said(self, values: Floats) -> str:
        """Values with their shares: the most frequent five, and how many more there are."""
        order = sorted(values, key=lambda value: -self._share([value]))
        words = ", ".join(f"{v:.12g} ({100 * self._share([v]):.3g} %)" for v in sorted(order[:5]))
        rest = order[5:]
        return words + (f" and {len(rest)} more ({100 * self._share(rest):.3g} %)" if rest else "")
