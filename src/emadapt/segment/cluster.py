"""Blocks as tasks of dask.distributed, on this machine or on a cluster.

Every machine needs the same paths, as on a shared disk. The worker marks a finished block on the
disk; when a worker dies, another one takes over its block. Dask's processes send each other pickled
functions, so trust a scheduler's address as you would trust a login.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from emadapt.errors import InputError, not_installed

RETRIES = 3
"""Of a block whose worker failed, other than by an error of the input."""
Work = Callable[[str, str, int], int]
"""(Folder, phase, number of a block) -> its number of slices, once it is finished."""


@contextmanager
def workers(where: str, work: Work) -> Iterator[Callable[[str, str, list[int]], Iterable[int]]]:
    """A function (folder, phase, numbers) that has workers `work` on blocks, in any order.

    `where` is the address of a scheduler, or `local:N` for N processes here.
    """
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise not_installed("dask.distributed", "cluster") from error
    with ExitStack() as stack:
        local = stack.enter_context(_local(where)) if where.startswith("local:") else where
        try:
            client = stack.enter_context(Client(local, timeout=30))
        except (OSError, ValueError) as error:
            found, expected = f"no scheduler at {where} ({error})", "tcp://HOST:PORT, or local:N"
            raise InputError(
                "--dask",
                found=found,
                expected=expected,
                do="Correct the address, or start one: `dask scheduler`.",
            ) from error
        yield lambda folder, phase, numbers: _finished(client, work, folder, phase, numbers)


def _local(where: str) -> Any:
    """N processes of one thread each on this machine."""
    from dask.distributed import LocalCluster

    number = where.removeprefix("local:")
    if not number.isdigit() or int(number) < 1:
        expected = "local:N with N of 1 or more"
        raise InputError("--dask", found=where, expected=expected, do="Write local:4, for example.")
    return LocalCluster(
        host="127.0.0.1",
        n_workers=int(number),
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=None,
    )


def _finished(
    client: Any, work: Work, folder: str, phase: str, numbers: list[int]
) -> Iterator[int]:
    """Numbers of slices as the tasks of blocks end; the first error ends all."""
    from dask.distributed import KilledWorker, as_completed

    run = uuid.uuid4().hex[:8]
    keys = [f"{phase}-{number}-{run}" for number in numbers]
    finish = functools.partial(on_worker, work, folder, phase)
    for task in as_completed(client.map(finish, numbers, key=keys, retries=RETRIES, pure=False)):
        try:
            slices = task.result()
        except KilledWorker as error:
            raise InputError(
                f"workers at block {task.key}",
                found=f"several that died ({error})",
                expected="workers that live",
                do="Look at their logs (out of memory?) and repeat the command to go on.",
            ) from error
        if isinstance(slices, InputError):
            raise slices
        yield slices


def on_worker(work: Work, folder: str, phase: str, number: int) -> int | InputError:
    """`work`, on a GPU of its own if the machine has several.

    An error of the input is returned and not raised, since retries would not help.
    """
    import torch
    from dask.distributed import get_worker

    name = get_worker().name  # a number in `_local`; on a cluster the batch system deals out GPUs
    if torch.cuda.device_count() > 1 and isinstance(name, int):
        torch.cuda.set_device(name % torch.cuda.device_count())
    try:
        return work(folder, phase, number)
    except InputError as error:
        return error
