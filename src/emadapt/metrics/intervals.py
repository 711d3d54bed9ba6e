"""95 % intervals of a metric, over the places that were tested and over the seeds trained.

Neighbouring slices of a volume are almost copies, so they are no independent samples. Columns,
squares of the plane with all of its slices, nearly are. A metric is a ratio of sums over cells
(a slice of a column); it is linearised, and its variance is that of sums over columns, in which
neighbours are taken to be half alike. What whole slices have in common beyond that (a section out
of focus) is added, with as many independent slices as their autocorrelation leaves: a two-way
cluster-robust variance (Cameron, Gelbach & Miller 2011). Student's t then has the degrees of
freedom of Bell & McCaffrey (2002). `python -m benchmarks.calibration` prints how often such an
interval holds the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, t

FEWEST_PARTS = 4.0
"""Independent slices that an interval needs without columns."""
LEAST_PARTS = 1.5
"""Independent slices from which it can be told whether columns vary together."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Error(NamedTuple):
    """Sampling error of an estimate."""

    variance: float
    freedom: float
    """Degrees of freedom of the variance; 0: too few independent parts to say anything."""

    def margin(self, level: float) -> float:
        """Distance from the estimate to this quantile of its distribution."""
        if not self.freedom:
            return np.inf
        return float(t.ppf(level, self.freedom) * self.variance**0.5) if self.variance else 0.0


def influence(counts: Counts, metric: str = "iou") -> tuple[float, Floats]:
    """A pooled metric, and by how much each cell lifts it (its linearisation).

    Args:
        counts: (slices, rows, columns, 3) pixels that are in both, predicted, labelled; of several
            classes, whose mean is taken, (slices, classes, rows, columns, 3).
        metric: "iou" or "dice".

    Returns:
        The metric, 0 to 1 (1 where both masks are empty), and (slices, rows, columns), sum 0.
    """
    if counts.ndim > 4:
        values, lifts = zip(*(influence(own, metric) for own in counts.swapaxes(0, 1)), strict=True)
        return float(np.mean(values)), np.mean(lifts, axis=0)
    both, predicted, labelled = np.moveaxis(counts.astype(float), -1, 0)
    over, under = both, predicted + labelled - both
    if metric == "dice":
        over, under = 2 * both, predicted + labelled
    total = under.sum()
    if not total:
        return 1.0, np.zeros(under.shape)
    value = float(over.sum() / total)
    return value, (over - value * under) / total


def sizes(counts: Counts) -> Floats:
    """(rows, columns) pixels by which columns weigh, a mean over seeds; classes weigh the same.

    `counts` are those of `over_seeds`.
    """
    size = counts[..., 1:].sum((0, 1, -1)) / len(counts)
    if size.ndim > 2:
        size = (size / np.maximum(size.sum((1, 2), keepdims=True), 1)).mean(0)
    return np.asarray(size, np.float64)


def sampling_error(lifts: Floats, size: Floats) -> Error:
    """How far an estimate would move with other places of the same kind.

    Args:
        lifts: (slices, rows, columns) of `influence`, or the difference of two models.
        size: (rows, columns) foreground pixels, by which columns weigh.
    """
    n, *grid = lifts.shape
    cells, slices, weights = lifts.reshape(n, -1), lifts.sum((1, 2)), size.ravel()
    if not cells.any():
        return Error(0.0, 1.0 if (weights > 0).sum() > 1 else 0.0)
    if len(weights) == 1:
        return _of_slices(slices)
    near = _near(grid)
    own = _of_columns(cells.sum(0), weights / weights.sum(), near)
    parts = independent_slices(n, _autocorrelation(cells))
    if parts < LEAST_PARTS:  # what the whole volume has in common cannot be seen
        return own
    kept = 1 - 1 / parts  # what is left of the slices' variance around their own mean
    of_slices, of_cells = float((slices**2).mean()) / kept, float((cells @ near * cells).sum()) / n
    if of_slices > of_cells * chi2.ppf(0.95, parts - 1) / (parts - 1):
        return _of_slices(slices)
    alike = max(0.0, of_slices - of_cells) / (1 - float(near.mean()))
    return added(own, Error(alike * n**2 / parts, parts - 1))


def independent_slices(n: int, correlation: float) -> float:
    """How many independent slices say as much as n whose neighbours correlate (0 to below 1)."""
    lags = np.arange(1, n)
    return float(n / (1 + 2 * ((1 - lags / n) * correlation**lags).sum()))


def added(*errors: Error) -> Error:
    """The sum of independent errors, with the degrees of freedom of Welch and Satterthwaite."""
    errors = tuple(error for error in errors if error.variance or not error.freedom)
    if not errors:
        return Error(0.0, 1.0)
    variance = sum(error.variance for error in errors)
    if not all(error.freedom for error in errors):
        return Error(variance, 0.0)
    return Error(variance, variance**2 / sum(e.variance**2 / e.freedom for e in errors))


def of_seeds(values: Floats) -> Error:
    """Error of the mean over the seeds that were trained; none can be told of a single seed."""
    n = len(values)
    return Error(float(np.var(values, ddof=1)) / n if n > 1 else 0.0, max(1, n - 1))


def over_seeds(counts: Counts, metric: str = "iou") -> dict[str, Any]:
    """One metric of a model over its seeds, with the 95 % interval of the mean.

    Args:
        counts: (seeds, slices, [classes,] rows, columns, 3), see `influence`.
        metric: "iou" or "dice".

    Returns:
        `mean`, `std` (n - 1; 0 for one seed), `values`, `ci95` within 0 and 1; 6 digits. With too
        few independent parts `ci95` is [0, 1]; one seed has the interval of its places alone.
    """
    values, lifts = zip(*(influence(own, metric) for own in counts), strict=True)
    places = sampling_error(np.mean(lifts, axis=0), sizes(counts))
    return mean_with_interval(np.array(values), places)


def mean_with_interval(values: Floats, places: Error) -> dict[str, Any]:
    """What `over_seeds` gives, of the values of seeds and the sampling error of their mean."""
    mean = float(np.mean(values))
    margin = added(places, of_seeds(values)).margin(0.975)
    ends = max(0.0, mean - margin), min(1.0, mean + margin)
    return {
        "mean": round(mean, 6),
        "std": round(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, 6),
        "values": [round(float(value), 6) for value in values],
        "ci95": [round(end, 6) for end in ends],
    }


def _near(grid: Sequence[int]) -> Floats:
    """(columns, columns) weights of pairs: 1 of a column itself, half along y, half along x.

    Sums with these weights are means over all squares of two by two columns.
    """
    rows, columns = (np.eye(k) + np.eye(k, k=1) / 2 + np.eye(k, k=-1) / 2 for k in grid)
    return np.asarray(np.kron(rows, columns), np.float64)


def _of_columns(sums: Floats, weights: Floats, near: Floats) -> Error:
    """Variance of a sum over columns of which near ones are alike.

    If a column's standard deviation is proportional to its weight, the variance is unbiased and
    has these degrees of freedom (Bell & McCaffrey 2002).
    """
    centred = np.eye(len(sums)) - weights[:, None]  # the estimate takes the mean away
    model = centred.T @ near @ centred * weights**2
    trace = float(np.trace(model))
    if trace <= 1e-9 * float((weights**2).sum()):  # all in one column
        return Error(0.0, 0.0)
    scale = float((weights**2).sum()) / trace
    return Error(float(sums @ near @ sums) * scale, trace**2 / float((model * model.T).sum()))


def _of_slices(slices: Floats) -> Error:
    """Variance of a sum over slices that drift together, where columns are no help.

    Their autocorrelation is taken two standard errors too high: measured in few slices it is too
    low, and intervals would be too narrow.
    """
    n = len(slices)
    correlation = _autocorrelation(slices[:, None]) + 2 * n**-0.5
    parts = independent_slices(n, min(correlation, 0.999))
    if parts < FEWEST_PARTS:
        return Error(0.0, 0.0)
    return Error(float((slices**2).mean()) / (1 - 1 / parts) * n**2 / parts, parts - 1)


def _autocorrelation(series: Floats) -> float:
    """Of neighbours along the first axis, pooled over the second; 0 to 0.99."""
    earlier, later = series[:-1], series[1:]
    scale = float((earlier**2).sum() * (later**2).sum()) ** 0.5
    return float(np.clip((earlier * later).sum() / scale, 0, 0.99)) if scale else 0.0
