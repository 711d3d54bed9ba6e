"""`emadapt sweep run`: begin or resume a sweep, start its workers, watch them, end them all."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import asdict

import optuna
from optuna.trial import FrozenTrial, TrialState

from emadapt.errors import InputError
from emadapt.progress import progress_bar
from emadapt.study.study import Study
from emadapt.sweep.crew import Crew, Order
from emadapt.sweep.record import add_result, progress, sweep_run
from emadapt.sweep.space import check_target, default_point, settings_hash
from emadapt.sweep.storage import (
    STORAGE_ERRORS,
    Store,
    best_trial,
    n_ended,
    open_store,
    retry_lost,
    study_names,
)
from emadapt.tracking.publish import Log, live, publish
from emadapt.tracking.redact import said_by

POLL = 0.5
"""Seconds between looks at the workers."""
OUTAGE = 5.0
"""Seconds between looks for a database that went away."""
MAX_WORKERS = 100
"""Workers of one `sweep run`, replacements included, that have numbers of their own."""


def run_sweep(config: Study, order: Order) -> str:
    """Run a sweep until at least `order.trials` trials are finished or pruned.

    Returns:
        Its full name.

    Raises:
        EmadaptError: it cannot be begun as asked, or too many of its trials or workers fail.
        KeyboardInterrupt: it was told to stop; no process is left, and no trial is lost.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # `kill`, and a terminal that is closed
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
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
            "--name", found=repr(name), expected="letters, digits, - and _", do="Choose another."
        )
    from emadapt.models.weights import check_source

    check_source(config.backbone_settings[target.backbone])
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


def _watch(crew: Crew, study: optuna.Study, store: Store, log_progress: Log) -> None:
    """Wait until all workers have ended well; replace those that die.

    Raises:
        EmadaptError: workers keep dying, or one has given up.
    """
    ended, waiting = n_ended(study.get_trials(deepcopy=False)), False
    with progress_bar(f"sweep {study.study_name}", crew.order.trials, ended) as advance:
        while crew.workers:
            time.sleep(POLL)
            try:
                trials = study.get_trials(deepcopy=False)
                advance(n_ended(trials) - ended, _words(trials))
                if n_ended(trials) > ended:
                    ended, crew.deaths = n_ended(trials), 0
                    log_progress(progress(trials), ended)
                crew.replace_dead(more=ended < crew.order.trials)
            except STORAGE_ERRORS as error:  # until it is back nobody can run a trial
                if not waiting:
                    print(f"{store.words}: {said_by(error)}; waiting for it")
                waiting = True
                time.sleep(OUTAGE)


def _words(trials: list[FrozenTrial]) -> str:
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    best = best_trial(trials)
    return f"{running} running" + (f", best validation score {best.value:.4f}" if best else "")
