"""`emadapt segment`: from checks over blocks to outputs. A run that was stopped can go on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.segment.instances import join
from emadapt.segment.job import Order, prepare
from emadapt.segment.outputs import finish, publish, targets
from emadapt.segment.partial import Partial, begin, held, opened
from emadapt.segment.phases import phases, segment_block, work
from emadapt.volumes.writing import suffix_of

Each = Callable[[str, str, list[int]], Iterable[int]]
"""(Folder, phase, numbers of blocks) -> these numbers, as blocks are finished."""


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
    check_output(order, targets(order.output, order.kinds), folder)
    with held(folder):
        started = time.perf_counter()
        partial = _begun(order, folder)
        if not (folder / "made.json").is_file():
            with _workers(order.dask) as each:
                seconds = _run(partial, order, each)
            _say(partial, order, seconds, time.perf_counter() - started)
        publish(_made(folder), folder / "aside")
    shutil.rmtree(folder)
    return output


def check_output(order: Order, named: dict[str, Path], folder: Path) -> None:
    """Check that the output can be written, before any work.

    Raises:
        InputError: it cannot.
    """
    suffix_of(order.output)
    parent = Path(order.output).resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            order.output,
            found=f"no folder {parent} that can be written to",
            expected="one",
            do="Make it, or choose another output.",
        )
    source = Path(order.input.partition(":/")[0]).resolve()
    places = [path.resolve() for path in named.values()]
    if any(source == p or p in source.parents or source in p.parents for p in places):
        raise InputError(
            order.output,
            found="the input itself, or a part of it or around it",
            expected="another file",
            do="Choose another output.",
        )
    there = [path for path in named.values() if path.exists()]
    if there and not order.overwrite and not (folder / "made.json").is_file():
        raise InputError(
            ", ".join(map(str, there)),
            found="an output of that name",
            expected="none",
            do="Choose another name, or replace it with --overwrite.",
        )
    for path in there:
        if path.is_dir() and not _is_ours(path):
            raise InputError(
                path,
                found="a folder that emadapt did not write",
                expected="none, or an output of `emadapt segment`",
                do="Move it, or choose another output.",
            )


def _is_ours(path: Path) -> bool:
    """Whether a Zarr says that it was segmented by emadapt."""
    try:
        return "emadapt" in json.loads((path / ".zattrs").read_text())
    except (OSError, ValueError):
        return False


def _begun(order: Order, folder: Path) -> Partial:
    """The run's folder, new or gone on with; nothing is left where the input is refused."""
    try:
        return begin(folder, prepare(order), order.overwrite)
    except BaseException:
        if not (folder / "run.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(partial: Partial, order: Order, each: Each) -> float:
    """All phases; the seconds that segmenting took."""
    began = time.perf_counter()
    for phase in phases(partial):
        _phase(partial, phase, each)
    seconds = time.perf_counter() - began
    made = {}
    named = targets(order.output, partial.job.kinds)
    if "instances" in named:
        _phase(partial, "components", each)
        table = partial.folder / "instances.csv"
        n = join(partial, table)
        _phase(partial, "instances", each)
        made[str(table)] = str(named["table"].resolve())
        print(f"segment: {n} instances, {named['table']}")
    for kind in ("probabilities", "instances", "mask"):
        if kind in named:
            made[str(finish(partial, kind, order.output))] = str(named[kind].resolve())
    write_json(partial.folder / "made.json", made)
    return seconds


def _made(folder: Path) -> dict[Path, Path]:
    """What a run has made in its folder, and where it belongs."""
    made = json.loads((folder / "made.json").read_text())
    return {Path(a): Path(b) for a, b in made.items()}


def _phase(partial: Partial, phase: str, each: Each) -> None:
    """Finish the blocks that are left, with progress."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    left, total = partial.left(phase), len(partial.blocks)
    columns = (
        "segment: {task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        "blocks, left",
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(phase, total=total, completed=total - len(left))
        for _ in each(str(partial.folder), phase, left):
            progress.advance(task)


def _workers(dask: str) -> AbstractContextManager[Each]:
    if dask:
        from emadapt.segment.cluster import workers

        return workers(dask)
    return nullcontext(alone)


def alone(folder: str, phase: str, numbers: list[int]) -> Iterator[int]:
    """Blocks one after the other in this process; while one is segmented, the next is read."""
    partial = opened(folder)
    if phase != phases(partial)[0] or not numbers:
        yield from (work(folder, phase, number) for number in numbers)
        return
    load, blocks = partial.runner.load, partial.blocks
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, blocks[numbers[0]])
        for number, following in zip(numbers, [*numbers[1:], None], strict=True):
            loaded = ahead.result()
            if following is not None:
                ahead = reader.submit(load, blocks[following])
            segment_block(partial, number, loaded)
            yield number


def _say(partial: Partial, order: Order, seconds: float, whole: float) -> None:
    z, y, x = partial.job.shape
    share = sum(facts["foreground"] for facts in partial.facts("mask")) / (z * y * x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"segment {order.output}: {z} x {y} x {x} voxels, {share:.2%} foreground, "
        f"{whole:.0f} s ({seconds:.0f} s of segmenting), peak {peak:.0f} MB"
    )
