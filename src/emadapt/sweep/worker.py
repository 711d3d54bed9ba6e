"""A worker: a process that claims trials and runs them until the sweep is over. `emadapt sweep run` starts and watches it."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from emadapt.study.study import Study
from emadapt.study.sweep import SweepSettings
from emadapt.sweep.claims import claim, enroll, requeue
from emadapt.sweep.space import Target, search_space, unit_of
from emadapt.sweep.storage import Store, open_store
from emadapt.training.launch import die_with

POLL = 1.0  # s between looks for a trial when all that remain are running elsewhere


@dataclass(frozen=True)
class Job:
    """What a worker is started with.

    Attributes:
        name: of the sweep, in full.
        url: of the storage.
        owner: what it signs its trials with.
        parent: process that watches it.
        since: see `claim`.
    """

    name: str
    url: str
    owner: str
    parent: int
    since: int


def work(config: Study, target: Target, job: Job) -> None:
    """Claim and run trials until none is wanted any more."""
    die_with(job.parent)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    store = open_store(job.url, requeue=requeue)
    study = load(config, target, job.name, store)
    from emadapt.models import parallel  # torch
    from emadapt.sweep.trial import Sweep, run_trials

    parallel.join()  # says so where its GPU is missing, rather than run a weekend long on the CPU

    sweep, space = Sweep(study, store, config, target), search_space(config, target)
    stack = config.sweep.stack if config.regime_settings[target.regime].kind == "frozen" else 1
    while True:
        wanted = int(study.user_attrs["trials"])  # another `sweep run` may have asked for more
        trials = claim(
            study, store, space, job.owner, wanted=wanted, at_most=stack, since=job.since
        )
        if trials is None:
            return
        if trials:
            run_trials(sweep, trials)
        else:
            time.sleep(POLL)


def load(config: Study, target: Target, name: str, store: Store) -> optuna.Study:
    """The sweep with a sampler that repeats no other worker's draws, nor its own before a restart."""
    study = optuna.load_study(study_name=name, storage=store.storage)
    seed = config.sweep.seed + 1000 * enroll(study, store) + len(study.get_trials(deepcopy=False))
    epochs = config.train_settings(unit_of(config, target)).epochs
    return optuna.load_study(
        study_name=name,
        storage=store.storage,
        sampler=sampler(config.sweep, seed),
        pruner=pruner(config.sweep, epochs),
    )


def sampler(spec: SweepSettings, seed: int) -> BaseSampler:
    """Multivariate TPE that keeps away from what others are running, or a Gaussian process."""
    return (
        optuna.samplers.TPESampler(seed=seed)
        if spec.sampler == "tpe"
        else optuna.samplers.GPSampler(seed=seed)
    )


def pruner(spec: SweepSettings, epochs: int) -> BasePruner:
    """By name; a step is an epoch."""
    if spec.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    if spec.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=1, max_resource=epochs, reduction_factor=3
        )
    return optuna.pruners.NopPruner()
