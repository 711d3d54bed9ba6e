"""`emadapt sweep run`: begin or resume a sweep, start its workers, watch over them, end them all with itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import optuna
from optuna.trial import TrialState

from emadapt.errors import EmadaptError, InputError
from emadapt.study.study import Study
from emadapt.sweep.claims import failing, n_ended, requeue, take_back_all, take_back_silent
from emadapt.sweep.logbook import Logbook
from emadapt.sweep.space import Target, check_target, default_point, definition, definition_hash
from emadapt.sweep.storage import FOLDER, STORAGE_ERRORS, Store, find_sweep, open_store, open_sweep
from emadapt.tracking.store import redact
from emadapt.training.launch import STOPS, stoppable, visible

POLL = 0.5  # s between looks at the workers
SILENCE = 15.0  # s between looks for machines that fell silent
PATIENCE = 20.0  # s that workers get to end by themselves
MAX_BARREN = 3  # workers in a row that died without ever claiming a trial


@dataclass(frozen=True)
class Order:
    """What was asked for on the command line.

    Attributes:
        trials: that the sweep is to end with, those that it has included.
        workers: processes on this machine.
        gpus: numbers of the devices that they share.
        url: of the storage; empty: the journal.
        name: of the sweep; empty: after the study and the target.
        join: help a sweep that another machine has begun.
    """

    target: Target
    trials: int
    workers: int = 1
    gpus: tuple[str, ...] = ()
    url: str = ""
    name: str = ""
    join: bool = False


@dataclass
class Worker:
    """A worker process, head of a process group of its own."""

    number: int
    owner: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Crew:
    """The workers of this process.

    Attributes:
        name: of the sweep, in full.
        since: see `emadapt.sweep.claims.claim`.
        started: how many were started so far, replacements included.
        barren: how many died in a row without having claimed a trial.
    """

    order: Order
    name: str
    since: int
    workers: list[Worker] = field(default_factory=list)
    started: int = 0
    barren: int = 0


def run_sweep(config: Study, order: Order) -> str:
    """Run a sweep until it has `order.trials` ended trials.

    Returns:
        Its full name.

    Raises:
        EmadaptError: it cannot be begun as asked, or too many of its trials or workers fail.
        KeyboardInterrupt: it was told to stop; the running trials are in the queue again, and no process is left.
    """
    with stoppable():
        store = open_store(order.url, order.workers, requeue)
        if order.join and not store.shared:
            raise EmadaptError(
                f"{store.words}: --join needs a storage that machines share; give --storage postgresql://..."
            )
        name, data = _check(config, order)  # after the storage: it loads torch, which takes seconds
        with store.alone(name):
            study = _open(config, order, name, data, store)
            if not store.shared:
                take_back_all(
                    study, store, "its process was gone when the sweep was resumed", died=False
                )
            with Logbook(config, order.target, study, join=order.join) as book:
                _work(study, store, order, book)
    return study.study_name


def _check(config: Study, order: Order) -> tuple[str, dict[str, str]]:
    """The sweep's name, and the md5 of its data."""
    if order.trials < 1:
        raise InputError(
            "--trials",
            found=str(order.trials),
            expected="at least 1",
            do="Say how many the sweep is to end with.",
        )
    target = order.target
    check_target(config, target)
    name = order.name or f"{config.name}-{target.backbone}-{target.regime}-{target.train_set}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise InputError(
            "--name", found=repr(name), expected="letters, digits, - and _", do="Choose another."
        )
    from emadapt.data.ingest import open_volume
    from emadapt.models.weights import check_source

    spec = config.backbone_settings[target.backbone]
    check_source(spec.arch, spec.source, spec.file or None)
    datasets = (
        *config.train_set_settings[target.train_set].datasets,
        *([spec.reference] if spec.reference else []),
    )
    return name, {dataset: open_volume(dataset).md5 for dataset in datasets}


def _open(
    config: Study, order: Order, name: str, data: dict[str, str], store: Store
) -> optuna.Study:
    """The study; a new one begins with the settings of params.yaml, so that the default is among its trials."""
    trials = order.trials
    if order.join:
        found = _wait_for(store, name)
        trials = int(
            optuna.load_study(study_name=found, storage=store.storage).user_attrs["trials"]
        )
    says = definition(config, order.target)
    study, new = open_sweep(store, name, definition_hash(config, order.target), says, data, trials)
    if new and (point := default_point(config, order.target)):
        study.enqueue_trial(point)
    return study


def _wait_for(store: Store, name: str, seconds: float = 60.0) -> str:
    """The sweep's full name, once its first machine has set it up; a job array starts all at once, so one may be early.

    Raises:
        InputError: it is not there in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() > deadline
        try:
            found = find_sweep(store, name)
            if (
                late
                or "mlflow.parent"
                in optuna.load_study(study_name=found, storage=store.storage).user_attrs
            ):
                return found
        except InputError:
            if late:
                raise
        time.sleep(1)


def _work(study: optuna.Study, store: Store, order: Order, book: Logbook) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    trials = study.get_trials(deepcopy=False)
    wanted, crew = int(study.user_attrs["trials"]), Crew(order, study.study_name, since=len(trials))
    columns = (
        TextColumn(f"sweep {study.study_name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    looked, said = time.monotonic(), False
    with Progress(*columns) as bar, _hired(crew, study, store):
        task = bar.add_task("", total=wanted, completed=n_ended(trials), words="")
        while n_ended(trials) < wanted:
            if reason := failing(trials, wanted, crew.since):
                raise EmadaptError(f"sweep {study.study_name}: given up: {reason}")
            try:
                _replace_dead(crew, study, store)
                if time.monotonic() - looked > SILENCE:
                    looked = time.monotonic()
                    take_back_silent(study, store)
                time.sleep(POLL)
                trials = study.get_trials(deepcopy=False)
            except (
                STORAGE_ERRORS
            ) as error:  # it may come back; until then nobody can claim anything
                if not said:
                    bar.console.print(
                        f"{store.words}: {redact(str(error).splitlines()[0])}; waiting for it",
                        markup=False,
                    )
                said = True
                time.sleep(10 * POLL)
                continue
            book.follow(trials)
            bar.update(task, completed=n_ended(trials), words=_words(trials))


def _words(trials: list[optuna.trial.FrozenTrial]) -> str:
    values = [t.value for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    running = sum(t.state == TrialState.RUNNING for t in trials)
    return f"{running} running" + (f", best validation IoU {max(values):.4f}" if values else "")


def _replace_dead(crew: Crew, study: optuna.Study, store: Store) -> None:
    """Start workers up to the number ordered; take back what dead ones had claimed.

    Raises:
        EmadaptError: workers die before they claim anything.
    """
    trials = study.get_trials(deepcopy=False)  # first: without a storage no worker can start either
    for worker in list(crew.workers):
        if (code := worker.process.poll()) is None:
            continue
        _kill_group(worker)  # what it may have started itself
        died = f"signal {-code}" if code < 0 else f"exit code {code}"
        take_back_all(study, store, f"its worker died ({died})", worker.owner)
        crew.workers.remove(worker)
        claimed = any(t.user_attrs.get("owner") == worker.owner for t in trials)
        crew.barren = 0 if claimed or code == 0 else crew.barren + 1
        if crew.barren >= MAX_BARREN:
            tail = "\n".join(
                f"    {line}" for line in worker.log.read_text(errors="replace").splitlines()[-15:]
            )
            raise EmadaptError(
                f"sweep {crew.name}: {crew.barren} workers died at once ({died}); {worker.log} ends with\n{tail}"
            )
    used = {w.number for w in crew.workers}
    for number in range(crew.order.workers):
        if number not in used:
            crew.workers.append(_start(crew, number))


def _start(crew: Crew, number: int) -> Worker:
    """One worker, in a session of its own: Ctrl-C reaches it through this process alone."""
    order, target = crew.order, crew.order.target
    crew.started += 1
    owner = f"{os.uname().nodename}/{os.getpid()}/{crew.started}"
    environment = os.environ | {
        "EMADAPT_SWEEP_STORAGE": order.url
    }  # not as an argument: everybody sees those
    if order.workers > 1:
        environment["OMP_NUM_THREADS"] = str(
            max(1, len(os.sched_getaffinity(0)) // order.workers)
        )  # a job's share of a node
    if order.gpus:
        device = order.gpus[number % len(order.gpus)]
        environment |= {"EMADAPT_DEVICES": device, **visible([device])}
    command = [
        sys.executable,
        "-m",
        "emadapt",
        "sweep",
        "worker",
        crew.name,
        "--backbone",
        target.backbone,
        "--regime",
        target.regime,
        "--train-set",
        target.train_set,
        "--owner",
        owner,
        "--parent",
        str(os.getpid()),
        "--since",
        str(crew.since),
    ]
    log = FOLDER / crew.name / f"worker-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return Worker(number, owner, _spawn(command, environment, out), log)


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


@contextlib.contextmanager
def _hired(crew: Crew, study: optuna.Study, store: Store) -> Iterator[None]:
    """At the end, however it comes: every worker is gone, and what they were running is in the queue again."""
    try:
        yield
    finally:
        before = {
            s: signal.signal(s, lambda number, frame: _kill(crew)) for s in STOPS
        }  # a second Ctrl-C only hurries it
        for worker in crew.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while any(w.process.poll() is None for w in crew.workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        _kill(crew)
        for worker in crew.workers:
            worker.process.wait()
            with contextlib.suppress(*STORAGE_ERRORS):  # it is gone: the next run takes them back
                take_back_all(study, store, "the sweep was stopped", worker.owner, died=False)
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(crew: Crew) -> None:
    for worker in crew.workers:
        _kill_group(worker)


def _kill_group(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
