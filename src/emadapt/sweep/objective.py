"""A trial: train a unit with the settings that Optuna chose, and give its validation IoU.

Test slices are never looked at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import optuna
import torch
from optuna.trial import Trial

from emadapt.data.crops import plan_epoch
from emadapt.study.study import Study
from emadapt.sweep.space import Target, search_space, study_at, suggest
from emadapt.sweep.storage import FOLDER, STORAGE_ERRORS, first_number
from emadapt.tracking import tracker as tracking
from emadapt.training.fit import fit, score
from emadapt.training.plan import unit_key
from emadapt.training.train import prepare, unit_tags


class TrialFailed(Exception):
    """A trial failed by itself, as with a loss that is not finite; the sweep goes on."""


class Objective:
    """Optuna's objective: trains the target of a sweep at a point of its search space.

    Args:
        config: the study in params.yaml.
        target: what is swept.
        study: the sweep.
    """

    def __init__(self, config: Study, target: Target, study: optuna.Study) -> None:
        self.config, self.target, self.study = config, target, study
        self.space = search_space(config, target)

    def __call__(self, trial: Trial) -> float:
        """The validation IoU of the trial's best epoch.

        Raises:
            optuna.TrialPruned: the trial is not worth going on.
            TrialFailed: it cannot be trained; why is its attribute `failed`.
            SystemExit: the process cannot go on. The trial keeps running for Optuna, so that it is
                found lost and started again in another process.
        """
        trial.set_user_attr("owner", own_name())
        try:
            return self._train(trial)
        except (*STORAGE_ERRORS, torch.AcceleratorError) as error:
            # After its own errors a GPU is of no use to this process.
            raise SystemExit(f"sweep worker: {reason(error)}") from error
        except (KeyboardInterrupt, optuna.TrialPruned):
            raise
        except Exception as error:
            trial.set_user_attr("failed", reason(error))
            raise TrialFailed(reason(error)) from error
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what a trial held that did not fit is the next one's

    def _train(self, trial: Trial) -> float:
        number = first_number(self.study.get_trials(deepcopy=False)[trial.number])
        params = suggest(trial, self.space)
        config, unit = study_at(self.config, self.target, params)
        train = config.train_settings(unit)
        folder = FOLDER / self.study.study_name / f"trial-{number}"
        with self._run(trial, number) as run:
            inputs = prepare(config, unit)
            steps = len(plan_epoch(inputs.data.rows(), train, unit.seed, 0))

            def on_epoch(metrics: dict[str, float], step: int) -> None:
                run.log_metrics(metrics, step)
                epoch = step // steps
                trial.report(metrics["val/iou"], epoch)
                if epoch < train.epochs and trial.should_prune():
                    raise optuna.TrialPruned

            fit(inputs, train, unit, folder / unit_key(config, unit), on_epoch)
            scored = score(inputs.segmenter, inputs.volumes, inputs.views, every=0)
            run.log_metrics({f"val/best_{name}": value for name, value in scored.items()})
        shutil.rmtree(folder, ignore_errors=True)
        return scored["iou"]

    @contextlib.contextmanager
    def _run(self, trial: Trial, number: int) -> Iterator[tracking.Tracker]:
        """The trial's run in MLflow, below the sweep's; a retried trial goes on with its own."""
        name = self.study.study_name
        config, unit = study_at(self.config, self.target, trial.params)
        tags = {
            **unit_tags(config, unit, "sweep"),
            "unit": f"{name[:-9]}-trial-{number}",
            "sweep": name,
            "trial": str(number),
            "sweep.trial": f"{name}/{number}",
        }
        params = {**config.describe(unit), "sweep": trial.params}
        again = ("sweep.trial",) if number != trial.number else ()
        parent = self.study.user_attrs.get("mlflow.parent") or None
        run = tracking.open_run(Path(), config.name, tags, params, resume_by=again, parent=parent)
        try:
            yield run
        except optuna.TrialPruned:
            run.set_tags({"state": "pruned"})
            run.end("KILLED")
            raise
        except BaseException as error:
            run.__exit__(type(error), error, None)
            raise
        else:
            run.end()


def own_name() -> str:
    """Machine and process that a trial runs in."""
    return f"{os.uname().nodename}/{os.getpid()}"


def reason(error: Exception) -> str:
    """Why a trial failed, in a line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        return f"CUDA out of memory; a smaller `train.batch` needs less ({text})"
    return f"{type(error).__name__}: {text}"
