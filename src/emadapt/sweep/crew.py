"""The worker processes of a sweep: start them, replace those that die, end them all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import optuna

from emadapt.errors import EmadaptError
from emadapt.sweep.space import Target
from emadapt.sweep.storage import FOLDER, STORAGE_ERRORS, retry_lost
from emadapt.training.devices import visible

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 20.0
"""Seconds that workers get to end by themselves."""
MAX_DEATHS = 5
"""So many workers that died without a trial ended in between end a sweep."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """`kill`, and a terminal that is closed, end a sweep as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    heard = [s for s in STOPS if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Order:
    """What was asked for on the command line.

    Attributes:
        target: what is swept.
        trials: finished or pruned ones that are enough, those of earlier runs included.
        workers: processes on this machine.
        gpus: numbers of the devices they share.
        url: of the storage; empty for the journal.
        name: of the sweep; empty: after the study and the target.
    """

    target: Target
    trials: int
    workers: int = 1
    gpus: tuple[str, ...] = ()
    url: str = ""
    name: str = ""


@dataclass
class Worker:
    """A worker process, the head of a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def owner(self) -> str:
        """What it signs its trials with, see `objective.own_name`."""
        return f"{os.uname().nodename}/{self.process.pid}"

    def kill(self) -> None:
        """Kill it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self, lines: int = 15) -> str:
        """The end of its output."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"    {line}" for line in text)


@dataclass
class Crew:
    """The workers of this process. On leaving they are ended, and their trials queued again.

    Attributes:
        order: what was asked for.
        study: the sweep.
        first: number of the first worker.
        started: workers so far, replacements included.
        deaths: of workers since a trial has ended.
        workers: those at work, by their place among `order.workers`.
    """

    order: Order
    study: optuna.Study
    first: int
    started: int = 0
    deaths: int = 0
    workers: dict[int, Worker] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for place in range(self.order.workers):
            self.start(place)
        return self

    def start(self, place: int) -> None:
        """Start a worker, in a session of its own: Ctrl-C reaches it through this process."""
        order = self.order
        # Not an argument: everybody on the machine can read those.
        environment = os.environ | {"EMADAPT_SWEEP_STORAGE": order.url}
        if order.workers > 1:
            cores = len(os.sched_getaffinity(0))  # a job's share of a node
            environment["OMP_NUM_THREADS"] = str(max(1, cores // order.workers))
        if order.gpus:
            device = order.gpus[place % len(order.gpus)]
            environment |= {"EMADAPT_DEVICES": device, **visible([device])}
        options = {
            "--backbone": order.target.backbone,
            "--regime": order.target.regime,
            "--train-set": order.target.train_set,
            "--number": self.first + self.started,
            "--trials": order.trials,
            "--parent": os.getpid(),
        }
        words = [str(word) for option in options.items() for word in option]
        log = FOLDER / self.study.study_name / f"worker-{place}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "emadapt", "sweep", "worker", self.study.study_name]
        with log.open("ab") as out:
            self.workers[place] = Worker(_spawn([*command, *words], environment, out), log)
        self.started += 1

    def replace_dead(self, *, more: bool) -> None:
        """Take out workers that have ended; replace those that died while more trials are wanted.

        Raises:
            EmadaptError: workers keep dying, or one has given up.
        """
        for place, worker in list(self.workers.items()):
            code = worker.process.poll()
            if code is None:
                continue
            if code:
                worker.kill()  # what it may have started itself
                retry_lost(self.study, worker.owner)
            if not code or not more:
                del self.workers[place]
                continue
            self.deaths += 1
            if code == 2 or self.deaths >= MAX_DEATHS:  # 2: it has said what the matter is
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise EmadaptError(
                    f"sweep {self.study.study_name}: given up: a worker ended with {how}; "
                    f"{worker.log} ends with\n{worker.last_words()}"
                )
            self.start(place)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A second Ctrl-C only hurries it.
        before = {s: signal.signal(s, lambda number, frame: self._kill()) for s in STOPS}
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(
            worker.process.poll() is None for worker in self.workers.values()
        ):
            time.sleep(0.05)
        self._kill()
        for worker in self.workers.values():
            worker.process.wait()
            with contextlib.suppress(*STORAGE_ERRORS):  # it is gone: the next run retries them
                retry_lost(self.study, worker.owner)
        for number, handler in before.items():
            signal.signal(number, handler)

    def _kill(self) -> None:
        for worker in self.workers.values():
            worker.kill()


def _spawn(
    command: list[str], environment: dict[str, str], out: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
