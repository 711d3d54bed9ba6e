"""A trial: train a unit with the settings that Optuna chose, and give its validation score.

Test slices are never looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial, Trial

from emadapt.study.study import Study
from emadapt.sweep.space import Target, search_space, study_at, suggest
from emadapt.sweep.storage import FOLDER, STORAGE_ERRORS, first_number
from emadapt.tracking.publish import live
from emadapt.tracking.run import Run
from emadapt.training.plan import unit_key
from emadapt.training.prepare import prepare
from emadapt.training.regimes import regime_of
from emadapt.training.tracked import unit_run
from emadapt.training.validate import validate


class TrialFailed(Exception):
    """A trial failed by itself, as with a loss that is not finite; the sweep goes on."""


class Objective:
    """Optuna's objective: trains the target of a sweep at a point of its search space."""

    def __init__(self, config: Study, target: Target, study: optuna.Study) -> None:
        self.config, self.target, self.study = config, target, study
        self.space = search_space(config, target)

    def __call__(self, trial: Trial) -> float:
        """The validation score (IoU, AUROC) of the trial's best epoch.

        Raises:
            optuna.TrialPruned: the trial is not worth going on.
            TrialFailed: it cannot be trained; why is its attribute `failed`.
            SystemExit: the process cannot go on. The trial keeps running for Optuna, so that it is
                found lost and started again in another process.
        """
        trial.set_user_attr("owner", f"{os.uname().nodename}/{os.getpid()}")
        try:
            return self._train(trial)
        except (*STORAGE_ERRORS, torch.AcceleratorError) as error:
            # After its own errors a GPU is of no use to this process.
            raise SystemExit(f"sweep worker: {reason(error)}") from error
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("failed", reason(error))
            raise TrialFailed(reason(error)) from error
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what a trial held that did not fit is the next one's

    def _train(self, trial: Trial) -> float:
        config, unit = study_at(self.config, self.target, suggest(trial, self.space))
        train = config.train_settings(unit)
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        folder = folder_of(self.study, frozen)
        run = self._run(trial, first_number(frozen))
        with live(run) as log_epoch:
            regime = regime_of(config, unit)
            inputs = prepare(config, unit, regime)

            def on_epoch(metrics: dict[str, float], epoch: int) -> None:
                log_epoch(metrics, epoch)
                trial.report(metrics[f"val/{config.score}"], epoch)
                if epoch < train.epochs and trial.should_prune():
                    run.status = "KILLED"
                    raise optuna.TrialPruned

            regime.fit(inputs, folder / unit_key(config, unit), on_epoch)
            scored = validate(inputs, every=0)
            run.log({f"val/best_{name}": value for name, value in scored.items()})
        return scored[config.score]

    def _run(self, trial: Trial, number: int) -> Run:
        """The trial's run in MLflow, below the sweep's; a retried trial goes on with its own."""
        name = self.study.study_name
        config, unit = study_at(self.config, self.target, trial.params)
        run = unit_run(config, unit, "sweep")
        run.name = f"{name[:-9]}-trial-{number}"
        run.tags |= {"unit": run.name, "sweep": name, "trial": number}
        run.tags["unit.key"] = unit_key(config, unit)
        run.params["sweep"] = trial.params
        run.parent = {"sweep.parent": name}
        # A journal that lost its end gives a number again, to other settings.
        run.same = ("sweep", "trial", "unit.key")
        return run


def folder_of(study: optuna.Study, trial: FrozenTrial) -> Path:
    """Where the checkpoint of a trial is until it has ended."""
    return FOLDER / study.study_name / f"trial-{first_number(trial)}"


def reason(error: Exception) -> str:
    """Why a trial failed, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
