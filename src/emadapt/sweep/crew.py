"""The worker processes of a sweep: start them, replace those that die, end them all."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from typing import Self

import optuna

from emadapt.errors import EmadaptError
from emadapt.sweep.space import Target
from emadapt.sweep.storage import FOLDER, STORAGE_ERRORS, retry_lost
from emadapt.training.devices import share_of_cores, visible

PATIENCE = 20.0
"""Seconds that workers get to end by themselves."""
MAX_DEATHS = 5
"""So many workers that died without a trial ended in between end a sweep."""


@dataclass(frozen=True)
class Order:
    """What was asked for on the command line."""

    target: Target  # what is swept
    trials: int  # finished or pruned ones that are enough, those of earlier runs included
    workers: int = 1  # processes on this machine
    gpus: tuple[str, ...] = ()  # numbers of the devices they share
    url: str = ""  # of the storage; empty for the journal
    name: str = ""  # of the sweep; empty: after the study and the target


class Crew:
    """The workers of this process. On leaving they are ended, and their trials queued again.

    Args:
        order: what was asked for.
        study: the sweep.
        first: number of the first worker.

    Attributes:
        deaths: of workers since a trial has ended.
        workers: those at work, by their place among `order.workers`.
    """

    def __init__(self, order: Order, study: optuna.Study, first: int) -> None:
        self.order, self.study, self.next_number = order, study, first
        self.deaths = 0
        self.workers: dict[int, Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for place in range(self.order.workers):
            self._start(place)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            _signal(worker, signal.SIGTERM)
        for worker in self.workers.values():
            with contextlib.suppress(TimeoutExpired):
                worker.wait(PATIENCE)
            with contextlib.suppress(*STORAGE_ERRORS):  # it is gone: the next run retries them
                self._bury(worker)

    def replace_dead(self, *, more: bool) -> None:
        """Take out workers that have ended; replace those that died while more trials are wanted.

        Raises:
            EmadaptError: workers keep dying, or one has given up.
        """
        for place, worker in list(self.workers.items()):
            code = worker.poll()
            if code is None:
                continue
            if code:
                self._bury(worker)
            if not code or not more:
                del self.workers[place]
                continue
            self.deaths += 1
            if code == 2 or self.deaths >= MAX_DEATHS:  # 2: it has said what the matter is
                log = self._log(place)
                lines = log.read_text(errors="replace").splitlines()[-15:]
                end = "\n".join(f"    {line}" for line in lines)
                raise EmadaptError(
                    f"sweep {self.study.study_name}: given up: a worker ended with exit code"
                    f" {code}; {log} ends with\n{end}"
                )
            self._start(place)

    def _start(self, place: int) -> None:
        order = self.order
        # Not an argument: everybody on the machine can read those.
        environment = os.environ | {"EMADAPT_SWEEP_STORAGE": order.url}
        environment |= share_of_cores(order.workers)
        if order.gpus:
            device = order.gpus[place % len(order.gpus)]
            environment |= {"EMADAPT_DEVICES": device, **visible([device])}
        numbers = map(str, (self.next_number, order.trials, os.getpid()))
        words = ("sweep", "worker", self.study.study_name, *numbers)
        log = self._log(place)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.workers[place] = Popen(
                [sys.executable, "-m", "emadapt", *words],
                env=environment,
                stdin=DEVNULL,
                stdout=out,
                stderr=STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through this process
            )
        self.next_number += 1

    def _bury(self, worker: Popen[bytes]) -> None:
        """Kill a worker with all that it has started, and queue its trial again."""
        _signal(worker, signal.SIGKILL)
        worker.wait()
        retry_lost(self.study, f"{os.uname().nodename}/{worker.pid}")

    def _log(self, place: int) -> Path:
        return FOLDER / self.study.study_name / f"worker-{place}.log"


def _signal(worker: Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, number)
