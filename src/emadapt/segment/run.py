"""`emadapt segment`: from checks over blocks to outputs. A run that was stopped can go on.

Each phase is done with all blocks before the next begins: `tiles` (of a model that smooths along z,
the probabilities), `mask`, then `components` and `instances`, or `cores` and `grown` (see
`emadapt.segment.instances`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.models.device import peak_resident_mb
from emadapt.models.predict import smooth_z
from emadapt.models.segmenter import Probability
from emadapt.progress import progress_bar
from emadapt.segment.domain import domain_of_volume
from emadapt.segment.instances import (
    grow_block,
    join,
    join_grown,
    label_block,
    number_block,
    table_of,
)
from emadapt.segment.job import BLOCK, Block, Job, Order, prepare
from emadapt.segment.outputs import check_output, finish, publish, targets
from emadapt.segment.partial import DTYPES, STEPS, Partial, begin, clear, held, opened, shape_of
from emadapt.volumes.source import Array, Source, tell
from emadapt.volumes.voxel import Voxel

Each = Callable[[str, str, list[int]], Iterable[int]]
"""(Folder, phase, numbers of blocks) -> numbers of slices, as so many are done of a block."""
Steps = Callable[[Partial, int], Iterable[int]]
"""Finishes a block, by its number; yields as `Each`."""


def segment_volume(order: Order) -> Path:
    """Segment a volume, or go on where a run of the same order was stopped.

    Returns:
        The mask.

    Raises:
        InputError: something is wrong with the input, the model or the output.
        OSError: the disk is full or refuses to write. What is done is kept in OUTPUT.partial.
    """
    output = Path(order.output).absolute()  # workers, and who repeats the command, may be elsewhere
    folder = output.with_name(f"{output.name}.partial")
    made = folder / "made.json"
    check_output(order, is_finished=made.is_file())
    started = time.perf_counter()
    job = prepare(order)  # before there is a folder: a mistyped input must leave nothing
    with held(folder):
        partial = begin(folder, job, order.overwrite)
        if not made.is_file():
            if job.second_zoom:
                tell("segment", ["looks twice at each slice; --fast: once, in a third of the time"])
            if "tokens" in partial.runner.model.card:
                tell("segment", domain_of_volume(partial.runner).words().splitlines())
            with _workers(order.dask) as each:
                seconds = _run(partial, order, each)
            _say(partial, order, seconds, time.perf_counter() - started)
        places = json.loads(made.read_text()).items()
        publish({Path(source): Path(target) for source, target in places}, folder / "aside")
        clear(folder)
    shutil.rmtree(folder)
    return output


def _run(partial: Partial, order: Order, each: Each) -> float:
    """All phases; the seconds that segmenting took."""
    began = time.perf_counter()
    for phase in _first_phases(partial):
        _phase(partial, phase, each)
    seconds = time.perf_counter() - began
    made = {}
    named = targets(order.output, partial.job.kinds)
    if "instances" in named:
        table = partial.folder / "instances.csv"
        n = find_instances(partial, each, table)
        made[str(table)] = str(named["table"].resolve())
        print(f"segment: {n} instances, {named['table']}")
    for kind in ("probabilities", "instances", "mask"):
        if kind in named:
            finished = finish(partial.job, partial.folder / kind, order.output)
            made[str(finished)] = str(named[kind].resolve())
    write_json(partial.folder / "made.json", made)
    return seconds


def find_instances(partial: Partial, each: Each, table: Path) -> int:
    """Number the instances of a finished mask, and write their table as CSV; how many there are."""
    job = partial.job
    _phase(partial, "components", each)
    found = join(partial)
    _phase(partial, "cores" if job.cored else "instances", each)
    if job.cored:
        _phase(partial, "grown", each)
        found = join_grown(partial)
    listed = table_of(found, job.voxel_nm, 1 if job.cored else len(job.classes))
    listed.to_csv(table, index=False, float_format="%.12g")
    return len(found)


def number_mask(order: Order, mask: Source, voxel_nm: Voxel) -> int:
    """Write the connected components of a mask, numbered, as `order.output`; how many there are.

    Raises:
        InputError: there is none of `order.min_voxels`.
    """
    kinds, least = ("mask", "instances"), order.min_voxels
    parts = mask.parts(BLOCK)
    job = Job(order.input, mask.stamp, mask.shape, voxel_nm, kinds, least, *parts)
    output = Path(order.output).absolute()
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        partial = begin(Path(folder), job, overwrite=False)
        for block in partial.blocks:
            values = mask.read(block.z0, block.z1, block.y0, block.y1)
            partial.array("mask")[block.place] = values != 0
        n = find_instances(partial, _alone, partial.part("instances.csv"))
        if not n:
            found, do = f"no connected component of {least} voxels", "Lower --min-voxels."
            raise InputError(order.input, found=found, expected="one", do=do)
        made = finish(job, partial.folder / "instances", order.output)
        publish({made: output}, partial.folder / "aside")
    return n


def _first_phases(partial: Partial) -> list[str]:
    """The phases up to the mask."""
    return ["tiles", "mask"] if partial.job.reach else ["mask"]


def _phase(partial: Partial, phase: str, each: Each) -> None:
    """Finish the blocks that are left, with progress."""
    left, total = partial.left(phase), sum(map(len, partial.blocks))
    done = total - sum(len(partial.blocks[number]) for number in left)
    with progress_bar(f"segment: {phase}, slices", total, done) as advance:
        for slices in each(str(partial.folder), phase, left):
            advance(slices)


def _workers(dask: str) -> AbstractContextManager[Each]:
    if dask:
        from emadapt.segment.cluster import workers

        return workers(dask, work)
    return nullcontext(_alone)


def _alone(folder: str, phase: str, numbers: list[int]) -> Iterator[int]:
    """Blocks one after the other in this process; while one is segmented, the next is read."""
    partial = opened(folder)
    if phase != _first_phases(partial)[0] or not numbers:
        yield from (work(folder, phase, number) for number in numbers)
        return
    load, blocks = partial.runner.load, partial.blocks
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, blocks[numbers[0]])
        for number, following in zip(numbers, [*numbers[1:], None], strict=True):
            loaded = ahead.result()
            if following is not None:
                ahead = reader.submit(load, blocks[following])
            yield from _segment_block(partial, number, loaded)


def work(folder: str, phase: str, number: int) -> int:
    """Finish one block of a phase, in whatever process this is; returns its number of slices."""
    return sum(PHASES[phase](opened(folder), number))


def _segment_block(partial: Partial, number: int, loaded: Array | None = None) -> Iterator[int]:
    """A block through the model; `loaded` is what `Runner.load` gave of it ahead."""
    block, runner = partial.blocks[number], partial.runner
    rows = runner.probability(block, runner.load(block) if loaded is None else loaded)
    if not partial.job.reach:
        yield from _threshold(partial, number, rows)
        return
    kept = _empty(partial, block, "tiles")
    for z, some in rows:
        kept[..., z - block.z0, :, :] = np.rint(some * STEPS)
        yield 1
    partial.array("tiles")[(..., *block.place)] = kept
    partial.mark("tiles", number, {})


def _mask_block(partial: Partial, number: int) -> Iterator[int]:
    """Segment a block, or smooth its `tiles` along z, across the borders of blocks."""
    block, job = partial.blocks[number], partial.job
    if not job.reach:
        yield from _segment_block(partial, number)
        return
    tiles = partial.array("tiles")
    near = range(max(0, block.z0 - job.reach), min(job.shape[0], block.z1 + job.reach))
    steps = ((z, tiles[..., z, block.y0 : block.y1, :]) for z in near)
    rows = ((z, some.astype(np.float32) / np.float32(STEPS)) for z, some in steps)
    smoothed = smooth_z(rows, job.sigma)
    inside = ((z, p) for z, p in smoothed if block.z0 <= z < block.z1)
    yield from _threshold(partial, number, inside)


def _threshold(
    partial: Partial, number: int, rows: Iterable[tuple[int, Probability]]
) -> Iterator[int]:
    """Write the mask of a block and, if asked for, its probabilities."""
    block, job = partial.blocks[number], partial.job
    mask = _empty(partial, block, "mask")
    asked = "probabilities" in job.kinds
    probabilities = _empty(partial, block, "probabilities") if asked else None
    for z, some in rows:
        ids = partial.runner.ids(some)
        mask[z - block.z0] = ids if len(job.classes) > 1 else 255 * ids
        if probabilities is not None:
            probabilities[..., z - block.z0, :, :] = np.rint(some * 255)
        yield 1
    partial.array("mask")[block.place] = mask
    if probabilities is not None:
        partial.array("probabilities")[(..., *block.place)] = probabilities
    partial.mark("mask", number, {"foreground": int(np.count_nonzero(mask))})


def _empty(partial: Partial, block: Block, kind: str) -> Array:
    shape = block.z1 - block.z0, block.y1 - block.y0, partial.job.shape[2]
    return np.empty(shape_of(partial.job, kind, shape), DTYPES[kind])


def _at_once(finish: Callable[[Partial, int], None]) -> Steps:
    def steps(partial: Partial, number: int) -> Iterator[int]:
        finish(partial, number)
        yield len(partial.blocks[number])

    return steps


PHASES: dict[str, Steps] = {
    "tiles": _segment_block,
    "mask": _mask_block,
    "components": _at_once(label_block),
    "instances": _at_once(number_block),
    "cores": _at_once(number_block),
    "grown": _at_once(grow_block),
}


def _say(partial: Partial, order: Order, seconds: float, whole: float) -> None:
    z, y, x = partial.job.shape
    share = sum(facts["foreground"] for facts in partial.facts("mask")) / (z * y * x)
    print(
        f"segment {order.output}: {z} x {y} x {x} voxels, {share:.2%} foreground, "
        f"{whole:.0f} s ({seconds:.0f} s of segmenting), peak {peak_resident_mb():.0f} MB"
    )
