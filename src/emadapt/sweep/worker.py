"""A worker: a process in which Optuna runs trials until the sweep has enough of them."""

from __future__ import annotations

import shutil
import signal
import sys
from functools import partial

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial

from emadapt.errors import EmadaptError
from emadapt.study.study import Study
from emadapt.study.sweep import SweepSettings
from emadapt.sweep.objective import Objective, TrialFailed, folder_of
from emadapt.sweep.space import Target, target_of, unit_of
from emadapt.sweep.storage import ENDED, find_study, first_number, n_ended, open_store

MAX_FAILURES = 10
"""So many failed trials in a row end a sweep."""


def work(config: Study, name: str, url: str, number: int, trials: int) -> None:
    """Open the sweep of this full name in the storage at `url`; then as `run_trials`.

    Raises:
        EmadaptError: params.yaml or the data have changed since the sweep began, or as there.
    """
    signal.signal(signal.SIGTERM, lambda signal_number, frame: sys.exit(128 + signal_number))
    study = find_study(open_store(url), name)
    run_trials(config, target_of(study, config), study, number, trials)


def run_trials(
    config: Study, target: Target, study: optuna.Study, number: int, trials: int
) -> None:
    """Run trials in this process until the sweep has enough.

    Args:
        config: the study in params.yaml.
        target: what is swept.
        study: the sweep.
        number: of the worker; no other one of the sweep has it, on any machine.
        trials: finished or pruned ones that are enough.

    Raises:
        EmadaptError: trials keep failing.
    """
    from emadapt.training import devices

    devices.join()  # an error if the worker's GPU is missing, rather than a weekend on the CPU
    known = study.get_trials(deepcopy=False)
    if n_ended(known) >= trials:
        return  # MaxTrialsCallback would run one more
    # A fixed seed would repeat the draws of other workers, and its own after a restart.
    study.sampler = TPESampler(seed=config.sweep.seed + 1000 * number + len(known))
    study.pruner = make_pruner(config.sweep, config.train_settings(unit_of(config, target)).epochs)
    enough = MaxTrialsCallback(trials, states=ENDED)
    study.optimize(
        Objective(config, target, study),
        callbacks=[enough, _say, _tidy, partial(_give_up, since=len(known))],
        catch=(TrialFailed,),
        gc_after_trial=True,
    )


def make_pruner(settings: SweepSettings, epochs: int) -> BasePruner:
    """By name; a step is an epoch."""
    if settings.pruner == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    if settings.pruner == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return NopPruner()


def _say(study: optuna.Study, trial: FrozenTrial) -> None:
    result = f"validation score {trial.value:.4f}" if trial.value is not None else ""
    words = trial.user_attrs.get("failed") or result
    print(f"trial {first_number(trial)}: {trial.state.name.lower()} {words}".rstrip(), flush=True)


def _tidy(study: optuna.Study, trial: FrozenTrial) -> None:
    """Remove the checkpoint of a trial that has ended."""
    shutil.rmtree(folder_of(study, trial), ignore_errors=True)


def _give_up(study: optuna.Study, trial: FrozenTrial, since: int) -> None:
    """Stop when trials fail one after the other, of those from number `since` on."""
    trials = study.get_trials(deepcopy=False)[since:]
    over = [t for t in trials if t.state in ENDED or "failed" in t.user_attrs]
    last = over[-MAX_FAILURES:]
    if len(last) == MAX_FAILURES and n_ended(last) == 0:
        raise EmadaptError(
            f"sweep {study.study_name}: given up: {MAX_FAILURES} trials in a row failed, "
            f"the last one (trial {first_number(trial)}) with: {last[-1].user_attrs['failed']}"
        )
