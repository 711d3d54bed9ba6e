"""`emadapt sweep status`: how far sweeps are."""

from __future__ import annotations

from datetime import timedelta

import optuna
from optuna.trial import TrialState
from rich import box
from rich.table import Table

from emadapt.sweep.storage import ENDED, best_trial, first_number, n_ended

SHOWN = 10


def overview(place: str, studies: list[optuna.Study]) -> Table:
    """A row a sweep: trials by state, best validation score, time a trial, time to go."""
    table = Table(title=f"sweeps in {place}", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("sweep", overflow="fold", min_width=14)
    for column in ("done", "pruned", "left", "run", "wait", "fail", "best", "a trial", "to go"):
        table.add_column(column, justify="right", no_wrap=True)
    for study in studies:
        trials = study.get_trials(deepcopy=False)
        counts = {state: sum(t.state == state for t in trials) for state in TrialState}
        left = max(0, int(study.user_attrs.get("trials", 0)) - n_ended(trials))
        running = counts[TrialState.RUNNING]
        best = best_trial(trials)
        known = [t.duration for t in trials if t.state in ENDED and t.duration]
        took = sum(known, timedelta()) / len(known) if known else None
        numbers = (
            counts[TrialState.COMPLETE],
            counts[TrialState.PRUNED],
            left,
            running,
            counts[TrialState.WAITING],
            sum("failed" in t.user_attrs for t in trials),  # others lost their process
        )
        table.add_row(
            study.study_name,
            *map(str, numbers),
            f"{best.value:.4f}" if best else "-",
            _text(took),
            _text(took * left / running if took and running else None),
        )
    return table


def ranking(study: optuna.Study) -> Table:
    """The best `SHOWN` trials of a sweep with their settings."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finished.sort(key=lambda trial: -(trial.value or 0))
    names = sorted({name for trial in finished for name in trial.params})
    table = Table(
        title=f"best of {len(finished)} finished trials",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("trial", "score", *names):
        table.add_column(column, justify="right", no_wrap=column == "trial")
    for trial in finished[:SHOWN]:
        default = " (default)" if "fixed_params" in trial.system_attrs else ""
        values = [trial.params.get(name, "-") for name in names]
        settings = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
        table.add_row(f"{first_number(trial)}{default}", f"{trial.value:.4f}", *settings)
    return table


def _text(time: timedelta | None) -> str:
    if time is None:
        return "-"
    if time.days:
        return f"{time.days} d {time.seconds // 3600} h"
    return str(timedelta(seconds=round(time.total_seconds())))
