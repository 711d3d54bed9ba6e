"""`emadapt sweep status`: how far sweeps are."""

from __future__ import annotations

from datetime import timedelta

import optuna
from optuna.trial import TrialState
from rich.table import Table

from emadapt.sweep.claims import n_ended
from emadapt.sweep.logbook import best_trial
from emadapt.sweep.storage import Store, sweep_names


def overview(store: Store, names: list[str] | None = None) -> Table:
    """A row a sweep: counts by state, what remains, the best, time per trial, and when it will be done."""
    table = Table(title=f"sweeps in {store.words}")
    for column in ("sweep", "finished", "pruned", "running", "waiting", "failed", "remaining", "best IoU", "a trial", "to go"):
        table.add_column(column, justify="left" if column == "sweep" else "right")
    for name in sweep_names(store) if names is None else names:
        study = optuna.load_study(study_name=name, storage=store.storage)
        trials = study.get_trials(deepcopy=False)
        counts = {s: sum(t.state == s for t in trials) for s in TrialState}
        failed = sum("failed" in t.user_attrs for t in trials)
        remaining = max(0, int(study.user_attrs.get("trials", 0)) - n_ended(trials))
        best, took = best_trial(trials), _mean_duration(trials)
        to_go = took * remaining / max(1, counts[TrialState.RUNNING]) if took else None
        table.add_row(
            name, str(counts[TrialState.COMPLETE]), str(counts[TrialState.PRUNED]), str(counts[TrialState.RUNNING]),
            str(counts[TrialState.WAITING]), str(failed), str(remaining), f"{best.value:.4f}" if best else "-", _text(took),
            "-" if remaining and not counts[TrialState.RUNNING] else _text(to_go),
        )  # fmt: skip
    return table


def ranking(store: Store, name: str, n: int = 10) -> Table:
    """The best trials of one sweep with their parameters."""
    study = optuna.load_study(study_name=name, storage=store.storage)
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    finished.sort(key=lambda t: -(t.value or 0))
    names = sorted({k for t in finished for k in t.params})
    table = Table(title=f"best of {len(finished)} finished trials")
    for column in ("trial", "validation IoU", *names):
        table.add_column(column, justify="right")
    for trial in finished[:n]:
        default = " (default)" if "fixed_params" in trial.system_attrs else ""
        table.add_row(f"{trial.number}{default}", f"{trial.value:.4f}", *(_number(trial.params.get(k, "-")) for k in names))
    return table


def _mean_duration(trials: list[optuna.trial.FrozenTrial]) -> timedelta | None:
    took = [t.duration for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and t.duration]
    return sum(took, timedelta()) / len(took) if took else None


def _text(time: timedelta | None) -> str:
    return "-" if time is None else str(timedelta(seconds=round(time.total_seconds())))


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
