"""Blocks as tasks of dask.distributed, on this machine or a cluster. Every machine needs the same paths, as on a shared disk.

A block that is finished is marked on the disk by the worker; a worker that dies loses the block that it was at, which another
takes over. Dask's processes send each other pickled functions, so a scheduler's address is to be trusted like a login.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from emadapt.errors import InputError
from emadapt.segment.partial import work

RETRIES = 3
"""Of a block whose worker had an error other than one of the input."""
AHEAD = 256
"""Blocks that the scheduler knows of at a time."""


@contextmanager
def workers(where: str) -> Iterator[Callable[[str, str, list[int]], Iterable[int]]]:
    """A function that has blocks finished by workers, in any order.

    Args:
        where: the address of a scheduler, or `local:N` for N processes of one thread here.

    Raises:
        InputError: dask is not installed, or there is no scheduler.
    """
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError as error:
        raise InputError(
            "--dask",
            found="no dask.distributed",
            expected="the extra `cluster`",
            do="Install it: pip install 'emadapt[cluster]'.",
        ) from error
    kind, _, number = where.partition(":")
    with ExitStack() as stack:
        if kind == "local":
            if not number.isdigit() or int(number) < 1:
                raise InputError(
                    "--dask", found=where, expected="local:N with N of 1 or more", do="Correct it."
                )
            cluster = LocalCluster(
                host="127.0.0.1",
                n_workers=int(number),
                threads_per_worker=1,
                memory_limit=0,
                dashboard_address=None,
            )
            address: Any = stack.enter_context(cluster)
        else:
            address = where
        try:
            client = stack.enter_context(Client(address, timeout=30))
        except (OSError, ValueError) as error:
            raise InputError(
                "--dask",
                found=f"no scheduler at {where} ({error})",
                expected="tcp://HOST:PORT, or local:N",
                do="Start one: `dask scheduler`.",
            ) from error
        yield lambda folder, phase, numbers: _finished(client, folder, phase, numbers)


def _finished(client: Any, folder: str, phase: str, numbers: list[int]) -> Iterator[int]:
    """Numbers of blocks as their tasks end; the first error of one ends all."""
    from dask.distributed import KilledWorker, as_completed

    run, waiting = uuid.uuid4().hex[:8], iter(numbers)

    def submit(number: int) -> Any:
        return client.submit(
            on_worker,
            folder,
            phase,
            number,
            key=f"{phase}-{number}-{run}",
            retries=RETRIES,
            pure=False,
        )

    tasks = as_completed([submit(n) for n in itertools.islice(waiting, AHEAD)])
    for task in tasks:
        try:
            number = task.result()
        except KilledWorker as error:
            raise InputError(
                f"workers at block {task.key}",
                found=f"several that died ({error})",
                expected="workers that live",
                do="See their logs; out of memory? Repeat the command to go on.",
            ) from error
        if isinstance(number, InputError):
            raise number
        for n in itertools.islice(waiting, 1):
            tasks.add(submit(n))
        yield number


def on_worker(folder: str, phase: str, number: int) -> int | InputError:
    """`work`, on a GPU of its own where the machine has several. An error of the input is handed back: it needs no retries."""
    from dask.distributed import get_worker

    name = get_worker().name
    if torch.cuda.device_count() > 1 and isinstance(
        name, int
    ):  # of LocalCluster; on a cluster the batch system deals them out
        torch.cuda.set_device(name % torch.cuda.device_count())
    try:
        return work(folder, phase, number)
    except InputError as error:
        return error
