"""`emadapt sweep run`: begin or resume a sweep, start its workers, watch them, end them all."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emadapt.errors import EmadaptError, InputError
from emadapt.study.study import Study
from emadapt.sweep.processes import STOPS, stoppable
from emadapt.sweep.record import add_result, progress, sweep_run
from emadapt.sweep.space import Target, check_target, default_point, settings_hash
from emadapt.sweep.storage import (
    FOLDER,
    STORAGE_ERRORS,
    Store,
    best_trial,
    n_ended,
    open_store,
    retry_lost,
    study_names,
)
from emadapt.tracking.publish import Log, live, publish
from emadapt.tracking.redact import redact
from emadapt.training.devices import visible

POLL = 0.5
"""Seconds between looks at the workers."""
OUTAGE = 5.0
"""Seconds between looks for a database that went away."""
PATIENCE = 20.0
"""Seconds that workers get to end by themselves."""
MAX_DEATHS = 5
"""So many workers that died without a trial ended in between end a sweep."""
MAX_WORKERS = 100
"""Workers of one `sweep run`, replacements included, that have numbers of their own."""


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


def run_sweep(config: Study, order: Order) -> str:
    """Run a sweep until at least `order.trials` trials are finished or pruned.

    Returns:
        Its full name.

    Raises:
        EmadaptError: it cannot be begun as asked, or too many of its trials or workers fail.
        KeyboardInterrupt: it was told to stop; no process is left, and no trial is lost.
    """
    with stoppable():
        check_target(config, order.target)
        store = open_store(order.url)
        name = full_name(config, order)
        with store.alone(name):
            with store.turn(name):
                study = begin(config, order, name, store)
                session = int(study.user_attrs.get("sessions", 0))
                study.set_user_attr("sessions", session + 1)
                run = sweep_run(config, order.target, name)
                publish(run)  # one machine makes it, the others find it
            with live(run) as log_progress:
                with Crew(order, study, first=MAX_WORKERS * session) as crew:
                    _watch(crew, study, store, log_progress)
                add_result(run, study)
    return name


def full_name(config: Study, order: Order) -> str:
    """The sweep's name with eight digits of its settings and data: others make another sweep.

    Raises:
        InputError: the name has other characters than letters, digits, - and _; or the data or
            the weights are not there.
    """
    target = order.target
    name = order.name or f"{config.name}-{target.backbone}-{target.regime}-{target.train_set}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise InputError(
            "--name",
            found=repr(name),
            expected="letters, digits, - and _",
            do="Choose another.",
        )
    from emadapt.models.weights import check_source

    spec = config.backbone_settings[target.backbone]
    check_source(spec.arch, spec.source, spec.file or None)
    return f"{name}-{settings_hash(config, target)}"


def begin(config: Study, order: Order, name: str, store: Store) -> optuna.Study:
    """Optuna's study. Its first trial has the settings of params.yaml; lost trials are retried."""
    earlier = [other for other in study_names(store) if other[:-9] == name[:-9]]
    if name not in earlier:
        for other in earlier:
            print(f"sweep: other settings or data than {other} has: this is a new sweep")
    study = optuna.create_study(
        study_name=name, storage=store.storage, direction="maximize", load_if_exists=True
    )
    if "target" not in study.user_attrs:
        if point := default_point(config, order.target):
            study.enqueue_trial(point)
        study.set_user_attr("target", asdict(order.target))
    study.set_user_attr("trials", order.trials)
    if not store.url:
        retry_lost(study)
    return study


@dataclass
class Worker:
    """A worker process, the head of a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def owner(self) -> str:
        """What it signs its trials with, see `objective.own_name`."""
        return f"{os.uname().nodename}/{self.process.pid}"


@dataclass
class Crew:
    """The workers of this process. On leaving they are ended, and their trials queued again.

    Attributes:
        order: what was asked for.
        study: the sweep.
        first: number of the first worker.
        started: workers so far, replacements included.
        workers: those at work, by their place among `order.workers`.
    """

    order: Order
    study: optuna.Study
    first: int
    started: int = 0
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
            kill_group(worker)


def kill_group(worker: Worker) -> None:
    """Kill a worker and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)


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


def _watch(crew: Crew, study: optuna.Study, store: Store, log_progress: Log) -> None:
    """Wait until all workers have ended well; replace those that die.

    Raises:
        EmadaptError: workers keep dying, or one has given up.
    """
    columns = (
        TextColumn(f"sweep {study.study_name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    deaths, ended, waiting = 0, 0, False
    with Progress(*columns) as bar:
        task = bar.add_task("", total=crew.order.trials, words="")
        while crew.workers:
            time.sleep(POLL)
            try:
                trials = study.get_trials(deepcopy=False)
                if n_ended(trials) > ended:
                    ended, deaths = n_ended(trials), 0
                    log_progress(progress(trials), ended)
                deaths += _replace_dead(crew, study, more=ended < crew.order.trials, deaths=deaths)
            except STORAGE_ERRORS as error:  # until it is back nobody can run a trial
                if not waiting:
                    said = redact(str(error).splitlines()[0])
                    bar.console.print(f"{store.words}: {said}; waiting for it", markup=False)
                waiting = True
                time.sleep(OUTAGE)
                continue
            bar.update(task, completed=ended, words=_words(trials))


def _replace_dead(crew: Crew, study: optuna.Study, *, more: bool, deaths: int) -> int:
    """Take out workers that have ended; replace those that died while more trials are wanted.

    Returns:
        How many died.
    """
    died = 0
    for place, worker in list(crew.workers.items()):
        code = worker.process.poll()
        if code is None:
            continue
        if code and more:
            died += 1
            kill_group(worker)  # what it may have started itself
            retry_lost(study, worker.owner)
            if code == 2 or deaths + died >= MAX_DEATHS:  # 2: it has said what the matter is
                raise EmadaptError(
                    f"sweep {study.study_name}: given up: "
                    f"a worker ended with {_how(code)}; {worker.log} ends with\n{_tail(worker.log)}"
                )
            crew.start(place)
        else:
            del crew.workers[place]
    return died


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in text)


def _words(trials: list[FrozenTrial]) -> str:
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    best = best_trial(trials)
    return f"{running} running" + (f", best validation IoU {best.value:.4f}" if best else "")
