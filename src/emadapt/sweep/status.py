"""`emadapt sweep status`: how far sweeps are."""

from __future__ import annotations

from datetime import timedelta

import optuna
from optuna.trial import TrialState
from rich import box
from rich.table import Table

from emadapt.sweep.claims import n_ended
from emadapt.sweep.logbook import best_trial
from emadapt.sweep.storage import Store


def overview(store: Store, names: list[str]) -> Table:
    """A row a sweep: trials by state, how many are left to end, best validation IoU, time a trial, time to go."""
    table = Table(
        title=f"sweeps in {store.words}", box=box.SIMPLE_HEAD, pad_edge=False, padding=0
    )  # fits 80 columns
    table.add_column("sweep", overflow="fold", min_width=14)
    for column in ("done", "pruned", "left", "run", "wait", "fail", "best", "a trial", "to go"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in names:
        study = optuna.load_study(study_name=name, storage=store.storage)
        trials = study.get_trials(deepcopy=False)
        counts = {s: sum(t.state == s for t in trials) for s in TrialState}
        wanted, running = int(study.user_attrs.get("trials", 0)), counts[TrialState.RUNNING]
        failed = sum(
            "failed" in t.user_attrs for t in trials
        )  # others were lost with their worker, and run again
        best, took = best_trial(trials), _mean_duration(trials)
        left = max(0, wanted - n_ended(trials))
        to_go = took * left / running if took and running else None
        done, pruned, waiting = (
            counts[s] for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
        )
        numbers = (done, pruned, left, running, waiting, failed)
        table.add_row(
            name,
            *map(str, numbers),
            f"{best.value:.4f}" if best else "-",
            _text(took),
            _text(to_go),
        )
    return table


def ranking(store: Store, name: str, n: int = 10) -> Table:
    """The best trials of one sweep with their parameters."""
    study = optuna.load_study(study_name=name, storage=store.storage)
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    finished.sort(key=lambda t: -(t.value or 0))
    names = sorted({k for t in finished for k in t.params})
    table = Table(
        title=f"best of {len(finished)} finished trials",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("trial", "IoU", *names):
        table.add_column(column, justify="right", no_wrap=column == "trial")
    for trial in finished[:n]:
        default = " (default)" if "fixed_params" in trial.system_attrs else ""
        table.add_row(
            f"{trial.number}{default}",
            f"{trial.value:.4f}",
            *(_number(trial.params.get(k, "-")) for k in names),
        )
    return table


def _mean_duration(trials: list[optuna.trial.FrozenTrial]) -> timedelta | None:
    took = [
        t.duration
        for t in trials
        if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and t.duration
    ]
    return sum(took, timedelta()) / len(took) if took else None


def _text(time: timedelta | None) -> str:
    if time is None:
        return "-"
    return (
        f"{time.days} d {time.seconds // 3600} h"
        if time.days
        else str(timedelta(seconds=round(time.total_seconds())))
    )


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
