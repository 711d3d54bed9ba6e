"""Who runs which trial: a sweep ends with exactly as many ended trials as it was asked for, whatever dies in between.

*Ended* means finished or pruned. The method, for any number of workers on any number of machines:

- A trial is claimed under the sweep's lock (see `emadapt.sweep.storage`), and only while ended + running < wanted. From
  then on a trial only moves from running to ended, which keeps the sum, or to failed, which makes room for one more. So
  there are never more than `wanted` ended trials, and workers that find no room wait until the running ones have ended
  or failed: then there are exactly `wanted`.
- Claiming ends, still under the lock, with writing the owner onto the trial. A running trial without an owner that
  somebody sees under the lock therefore belongs to a process that died while it claimed.
- A trial whose process is gone is failed and its parameters are put back into the queue, which claims empty first. Only
  one process can fail a trial (the storage refuses the second), so it is put back once. Who finds out: the
  parent of a dead worker at once; for a machine that is lost, any other one by the missing heartbeat (PostgreSQL); on the
  journal, the next `sweep run`, which is alone there.
- A worker that was taken for dead and yet comes back cannot tell its result: the trial has failed already.
- A database may still write the trial of a process that is dead, after its lock went to somebody else who took the room.
  That trial has no owner and never runs: the claims that find the sweep over fail it, and what is left in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from emadapt.sweep.space import Space
from emadapt.sweep.storage import Store

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_DEATHS = 3  # after so many dead workers a trial is a failure: it may be what kills them
MAX_FAILURES = 10  # so many failures in a row, or so many more than wanted trials, stop a sweep


def root_number(trial: FrozenTrial) -> int:
    """The number under which a trial was first run; it names the checkpoint and the MLflow run."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def claim(
    study: optuna.Study,
    store: Store,
    space: Space,
    owner: str,
    *,
    wanted: int,
    at_most: int,
    since: int,
) -> list[Trial] | None:
    """Up to `at_most` trials to run now; none if all that remain are running elsewhere; None if the sweep is over.

    Args:
        study: with the sampler that fills in the parameters.
        store: where it is kept.
        space: the dimensions.
        owner: who claims.
        wanted: trials that the sweep is to end with.
        at_most: how many the owner can take.
        since: failures of trials below this number do not count against the sweep.
    """
    with store.lock(study.study_name):
        for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "owner" not in lost.user_attrs:
                take_back(study, store, lost, "its process died while it claimed the trial")
        trials = study.get_trials(deepcopy=False)
        if n_ended(trials) >= wanted:
            for left in (t for t in trials if t.state == TrialState.WAITING):
                store.storage.set_trial_state_values(left._trial_id, TrialState.FAIL)
            return None
        if failing(trials, wanted, since):
            return None
        room = wanted - n_ended(trials) - sum(t.state == TrialState.RUNNING for t in trials)
        claimed = []
        for _ in range(min(room, at_most)):
            trial = study.ask(fixed_distributions=space)
            beat(store, trial)
            trial.set_user_attr("owner", owner)
            claimed.append(trial)
        return claimed


def n_ended(trials: Sequence[FrozenTrial]) -> int:
    """How many have finished or were pruned."""
    return sum(t.state in ENDED for t in trials)


def failing(trials: Sequence[FrozenTrial], wanted: int, since: int) -> str:
    """Why the sweep is given up, or nothing: too many trials failed by themselves, not for want of their worker."""
    recent = [
        t for t in trials if t.number >= since and (t.state in ENDED or "failed" in t.user_attrs)
    ]
    failures = [t for t in recent if t.state not in ENDED]
    in_a_row = len(recent) >= MAX_FAILURES and n_ended(recent[-MAX_FAILURES:]) == 0
    if in_a_row or len(failures) >= wanted + MAX_FAILURES:
        last = failures[-1]
        return f"{len(failures)} trials failed, the last one (trial {last.number}) with: {last.user_attrs['failed']}"
    return ""


def take_back(
    study: optuna.Study, store: Store, trial: FrozenTrial, reason: str, *, died: bool = True
) -> None:
    """Fail a running trial whose process is gone, or told to stop, and put its parameters back into the queue.

    A process that dies between the two loses the parameters; another trial takes their place.

    Args:
        study, store: its own.
        trial: it.
        reason: why.
        died: the worker died by itself; MAX_DEATHS times, and the trial is a failure.
    """
    deaths = int(trial.user_attrs.get("deaths", 0)) + died
    attrs = {"lost": reason} | (
        {"failed": f"its worker died {deaths} times; {reason}"} if deaths >= MAX_DEATHS else {}
    )
    try:
        for name, value in attrs.items():
            store.storage.set_trial_user_attr(trial._trial_id, name, value)
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return  # it ended, or somebody else was faster
    if deaths < MAX_DEATHS:
        requeue(study, trial, deaths)


def take_back_all(
    study: optuna.Study, store: Store, reason: str, owner: str | None = None, *, died: bool = True
) -> None:
    """`take_back` for every running trial, or for those of one owner."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if owner is None or trial.user_attrs.get("owner") == owner:
            take_back(study, store, trial, reason, died=died)


def take_back_silent(study: optuna.Study, store: Store) -> None:
    """Take back the trials of machines that fell silent; Optuna calls `requeue` for each."""
    if store.shared:
        optuna.storages.fail_stale_trials(study)


def requeue(study: optuna.Study, trial: FrozenTrial, deaths: int | None = None) -> None:
    """Put a failed trial's parameters back into the queue, with what it has reported so far."""
    if deaths is None:  # called by Optuna
        deaths = int(trial.user_attrs.get("deaths", 0)) + 1
    if "failed" in trial.user_attrs or deaths >= MAX_DEATHS:
        return
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={k: v for k, v in trial.user_attrs.items() if k not in ("owner", "lost")}
            | {"deaths": deaths},
            system_attrs={
                **trial.system_attrs,
                "failed_trial": root_number(trial),
                "retry_history": history,
            },
            intermediate_values=trial.intermediate_values,  # its checkpoint goes on after them
        )
    )


def end(
    study: optuna.Study, store: Store, trial: Trial, *, value: float | None = None, failed: str = ""
) -> bool:
    """Tell how a trial ended: with a value, failed by itself for a reason, or pruned.

    Returns:
        Whether it was still the caller's to tell.
    """
    state = (
        TrialState.FAIL if failed else TrialState.PRUNED if value is None else TrialState.COMPLETE
    )
    try:
        if failed:
            store.storage.set_trial_user_attr(trial._trial_id, "failed", failed)
        study.tell(trial, value if state == TrialState.COMPLETE else None, state)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return False
    return True


def beat(store: Store, trial: Trial) -> None:
    """Say that a trial lives, where the storage asks for it."""
    if isinstance(store.storage, optuna.storages.RDBStorage) and store.shared:
        store.storage.record_heartbeat(trial._trial_id)


def enroll(study: optuna.Study, store: Store) -> int:
    """A number that no other worker of this sweep has or had, on any machine: their samplers must not repeat each other."""
    with store.lock(study.study_name):
        number = int(study.user_attrs.get("workers", 0))
        study.set_user_attr("workers", number + 1)
    return number
