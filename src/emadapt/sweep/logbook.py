"""The sweep's own run in the lab book, above those of its trials: the best so far, how it was found, what mattered."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from emadapt.study.study import Study
from emadapt.sweep.claims import n_ended
from emadapt.sweep.space import Target
from emadapt.tracking import tracker as tracking

MIN_IMPORTANCE = 4  # finished trials, below which importance says nothing


class Logbook:
    """The parent run: opened or gone on with, followed while trials end, closed with the figures."""

    def __init__(
        self, config: Study, target: Target, study: optuna.Study, *, join: bool = False
    ) -> None:
        self.study, name = study, study.study_name
        tags = {
            **tracking.provenance_tags(Path()),
            "unit": name[:-9],
            "sweep": name,
            "stage": "sweep",
            "sweep.parent": name,
            "study": config.name,
            **dataclasses.asdict(target),
        }
        spec, space = config.sweep, study.user_attrs["definition"]["space"]
        params = {"space": space, "sampler": spec.sampler, "pruner": spec.pruner}
        self.tracker: tracking.Tracker = tracking.NullTracker()
        if not join:  # one machine writes it
            self.tracker = tracking.open_run(
                Path(), config.name, tags, params, resume_by=("sweep.parent",)
            )
            study.set_user_attr(
                "mlflow.parent", self.tracker.run_id or ""
            )  # machines that join wait for it
        self.ended = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        with contextlib.suppress(
            Exception
        ):  # a picture that cannot be drawn hides no error of the sweep
            self.follow(self.study.get_trials(deepcopy=False))
            if kind is None or issubclass(
                kind, Exception
            ):  # who has pressed Ctrl-C is not to wait for pictures
                self._draw()
        self.tracker.__exit__(kind, error, trace)

    def follow(self, trials: Sequence[FrozenTrial]) -> None:
        """Log the best so far whenever a trial has ended."""
        if (ended := n_ended(trials)) == self.ended:
            return
        self.ended = ended
        states = {
            f"trials.{s.name.lower()}": float(sum(t.state == s for t in trials)) for s in TrialState
        }
        best = best_trial(trials)
        numbers: dict[str, float] = {}
        if best is not None:
            numbers = {"best.val_iou": float(best.value or 0), "best.trial": float(best.number)}
            numbers |= {
                f"best.{k}": float(v) for k, v in best.params.items() if isinstance(v, int | float)
            }
            words: dict[str, Any] = {f"best.{k}": v for k, v in best.params.items()}
            self.tracker.set_tags({**words, "best.val_iou": best.value, "best.trial": best.number})
        self.tracker.log_metrics({**states, **numbers}, step=ended)

    def _draw(self) -> None:
        import matplotlib.pyplot as plt
        from optuna.visualization import matplotlib as draw

        finished = [
            t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE
        ]
        plots = {
            "history": draw.plot_optimization_history,
            "intermediate": draw.plot_intermediate_values,
        }
        if len(finished) >= MIN_IMPORTANCE and len({t.value for t in finished}) > 1:
            plots["importance"] = draw.plot_param_importances
        for name, plot in plots.items():
            if finished:
                plot(self.study)
                self.tracker.log_figure(plt.gcf(), f"figures/{name}.png")
                plt.close("all")


def best_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial with the highest validation IoU, the earliest of equals."""
    finished = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    return max(finished, key=lambda t: (t.value, -t.number), default=None)
