"""The sweep's own run in MLflow, above those of its trials: the best so far, and figures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from emadapt.study.study import Study
from emadapt.sweep.space import Target, definition
from emadapt.sweep.storage import best_trial, n_ended
from emadapt.tracking import tracker as tracking

MIN_IMPORTANCE = 4
"""Finished trials below which importance says nothing."""


class SweepRun:
    """The parent run: opened or gone on with, brought up to date as trials end."""

    def __init__(self, config: Study, target: Target, study: optuna.Study) -> None:
        self.study, self.ended, name = study, -1, study.study_name
        tags = {
            **tracking.provenance_tags(Path()),
            "unit": name[:-9],
            "sweep": name,
            "stage": "sweep",
            "sweep.parent": name,
            "study": config.name,
            **dataclasses.asdict(target),
        }
        params = {
            "space": definition(config, target)["space"],
            "sampler": config.sweep.sampler,
            "pruner": config.sweep.pruner,
        }
        self.tracker = tracking.open_run(
            Path(), config.name, tags, params, resume_by=("sweep.parent",)
        )
        if self.tracker.run_id:
            study.set_user_attr("mlflow.parent", self.tracker.run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        with contextlib.suppress(Exception):  # a figure must not hide an error of the sweep
            self.follow(self.study.get_trials(deepcopy=False))
            if kind is None or issubclass(kind, Exception):  # who pressed Ctrl-C is in a hurry
                self._draw()
        self.tracker.__exit__(kind, error, trace)

    def follow(self, trials: list[FrozenTrial]) -> None:
        """Log the best so far whenever a trial has ended."""
        ended = n_ended(trials)
        if ended == self.ended:
            return
        self.ended = ended
        numbers: dict[str, float] = {
            f"trials.{state.name.lower()}": sum(trial.state == state for trial in trials)
            for state in TrialState
        }
        if best := best_trial(trials):
            found: dict[str, Any] = {
                "best.val_iou": best.value,
                "best.trial": best.number,
                **{f"best.{name}": value for name, value in best.params.items()},
            }
            numbers |= {k: v for k, v in found.items() if isinstance(v, int | float)}
            self.tracker.set_tags(found)
        self.tracker.log_metrics(numbers, step=ended)

    def _draw(self) -> None:
        import matplotlib.pyplot as plt
        from optuna.visualization import matplotlib as draw

        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        plots: dict[str, Callable[[optuna.Study], Any]] = {}
        if trials:
            plots["history"] = draw.plot_optimization_history
            plots["intermediate"] = draw.plot_intermediate_values
        if len(trials) >= MIN_IMPORTANCE and len({t.value for t in trials}) > 1:
            plots["importance"] = draw.plot_param_importances
        for name, plot in plots.items():
            axes = plot(self.study)
            axes.figure.tight_layout()
            self.tracker.log_figure(axes.figure, f"figures/{name}.png")
            plt.close("all")
