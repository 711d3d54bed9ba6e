"""The phases of a run; each is done with all blocks before the next begins.

- `tiles`: probabilities, of a model that smooths them along z.
- `mask`: the mask and, if asked for, probabilities.
- `components` and `instances`: see `emadapt.segment.instances`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from emadapt.models.predict import smooth_z
from emadapt.models.segmenter import Probability
from emadapt.segment.instances import label_block, number_block
from emadapt.segment.job import Block
from emadapt.segment.partial import STEPS, Partial, opened, within
from emadapt.volumes.source import Array


def work(folder: str, phase: str, number: int) -> int:
    """Finish one block of a phase, in whatever process this is; returns its number."""
    PHASES[phase](opened(folder), number)
    return number


def phases(partial: Partial) -> list[str]:
    """The phases up to the mask."""
    return ["tiles", "mask"] if partial.job.reach else ["mask"]


def segment_block(partial: Partial, number: int, loaded: Array | None = None) -> None:
    """A block through the model; `loaded` is what `Runner.load` gave of it ahead."""
    block, runner = partial.blocks[number], partial.runner
    rows = runner.probability(block, runner.load(block) if loaded is None else loaded)
    if not partial.job.reach:
        _threshold(partial, number, rows)
        return
    kept = _empty(partial, block, "uint16")
    for z, some in rows:
        kept[z - block.z0] = np.rint(some * STEPS)
    partial.array("tiles")[within(block)] = kept
    partial.mark("tiles", number, {})


def smooth_block(partial: Partial, number: int) -> None:
    """Phase `mask` after `tiles`: smooth a block along z, across the borders of blocks."""
    block, job = partial.blocks[number], partial.job
    tiles = partial.array("tiles")
    near = range(max(0, block.z0 - job.reach), min(job.shape[0], block.z1 + job.reach))
    rows = ((z, _real(tiles[z, block.y0 : block.y1])) for z in near)
    smoothed = smooth_z(rows, job.sigma)
    _threshold(partial, number, ((z, p) for z, p in smoothed if block.z0 <= z < block.z1))


def _real(steps: Array) -> Probability:
    return steps.astype(np.float32) / np.float32(STEPS)


def _mask(partial: Partial, number: int) -> None:
    (smooth_block if partial.job.reach else segment_block)(partial, number)


def _threshold(partial: Partial, number: int, rows: Iterable[tuple[int, Probability]]) -> None:
    """Write the mask of a block and, if asked for, its probabilities."""
    block, job = partial.blocks[number], partial.job
    mask = _empty(partial, block, "uint8")
    probabilities = _empty(partial, block, "uint8") if "probabilities" in job.kinds else None
    for z, some in rows:
        mask[z - block.z0] = np.where(some > job.threshold, 255, 0)
        if probabilities is not None:
            probabilities[z - block.z0] = np.rint(some * 255)
    partial.array("mask")[within(block)] = mask
    if probabilities is not None:
        partial.array("probabilities")[within(block)] = probabilities
    partial.mark("mask", number, {"foreground": int(np.count_nonzero(mask))})


def _empty(partial: Partial, block: Block, dtype: str) -> Array:
    shape = block.z1 - block.z0, block.y1 - block.y0, partial.job.shape[2]
    return np.empty(shape, dtype)


PHASES: dict[str, Callable[[Partial, int], None]] = {
    "tiles": segment_block,
    "mask": _mask,
    "components": label_block,
    "instances": number_block,
}
