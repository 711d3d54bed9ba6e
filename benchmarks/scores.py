"""The bootstrap interval of an IoU from counts for each slice, against resampled masks."""

from __future__ import annotations

import numpy as np

from benchmarks.timing import print_table, seconds
from emadapt.metrics.intervals import REPLICATES, block_bootstrap
from emadapt.metrics.pixels import overlap_counts

SLICES, SIDE, BLOCK, DRAWS = 16, 1024, 4, 20


def main() -> None:
    """Print milliseconds for one resample of each way."""
    rng = np.random.default_rng(0)
    predicted, label = rng.random((2, SLICES, SIDE, SIDE)) < 0.1

    def by_counts() -> None:
        pairs = zip(predicted, label, strict=True)
        block_bootstrap(np.array([overlap_counts(a, b) for a, b in pairs]), BLOCK)

    def by_masks() -> None:
        for _ in range(DRAWS):
            starts = rng.integers(SLICES - BLOCK + 1, size=SLICES // BLOCK)
            chosen = (starts[:, None] + np.arange(BLOCK)).ravel()
            both, either = predicted[chosen] & label[chosen], predicted[chosen] | label[chosen]
            both.sum() / either.sum()

    counts, masks = seconds(by_counts) / REPLICATES, seconds(by_masks) / DRAWS
    row = {"counts_ms": 1000 * counts, "masks_ms": 1000 * masks, "ratio": masks / counts}
    print_table([row])


if __name__ == "__main__":
    main()
