"""Who runs which trial: exactly as many ended trials as wanted, whatever dies. No training here: a trial's value is a formula."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import Trial, TrialState

from emadapt.study.sweep import SweepSettings
from emadapt.sweep.claims import (
    MAX_DEATHS,
    MAX_FAILURES,
    claim,
    end,
    enroll,
    failing,
    n_ended,
    root_number,
    take_back_all,
)
from emadapt.sweep.space import Space
from emadapt.sweep.storage import Store, open_store, open_sweep
from emadapt.sweep.worker import sampler

SPACE: Space = {
    "x": FloatDistribution(1e-4, 1e-2, log=True),
    "kind": CategoricalDistribution(("a", "b")),
}
STATES = TrialState


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def begin(store: Store, trials: int = 5, name: str = "s") -> optuna.Study:
    return open_sweep(store, name, "0" * 8, {"space": {}}, {"a": "md5"}, trials)[0]


def take(
    study: optuna.Study, store: Store, owner: str = "me", *, wanted: int = 5, at_most: int = 1
) -> list[Trial] | None:
    return claim(study, store, SPACE, owner, wanted=wanted, at_most=at_most, since=0)


def one(study: optuna.Study, store: Store, **options: Any) -> Trial:
    claimed = take(study, store, **options)
    assert claimed is not None
    (trial,) = claimed
    return trial


def numbers(study: optuna.Study, *states: TrialState) -> list[int]:
    return [t.number for t in study.get_trials(deepcopy=False) if t.state in states]


EVENTS = st.lists(
    st.sampled_from(["claim", "claim", "claim", "finish", "prune", "die", "stop", "back"]),
    max_size=60,
)


@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.integers(1, 6), workers=st.integers(1, 4), events=EVENTS, seed=st.integers(0, 99))
def test_whatever_happens_there_are_never_more_than_wanted_and_in_the_end_exactly_so_many(
    wanted, workers, events, seed
) -> None:
    """Workers claim one or several, finish, prune, die, are stopped, or come back after they were taken for dead."""
    rng = random.Random(seed)
    store = Store(optuna.storages.InMemoryStorage(), "", shared=False)
    Path("scratch/sweeps").mkdir(parents=True, exist_ok=True)
    study, held, ghosts = begin(store, wanted), {w: [] for w in range(workers)}, []  # type: ignore[var-annotated]
    study.sampler = optuna.samplers.RandomSampler(seed=0)

    def happen(event: str) -> None:
        worker = rng.choice(list(held))
        mine: list[Trial] = held[worker]
        if event == "claim" and not mine:
            held[worker] = (
                take(study, store, str(worker), wanted=wanted, at_most=rng.choice([1, 3])) or []
            )
        elif event in ("finish", "prune") and mine:
            assert end(study, store, mine.pop(), value=0.5 if event == "finish" else None)
        elif event in ("die", "stop") and mine:
            ghosts.extend(mine)
            mine.clear()
            take_back_all(study, store, "gone", str(worker), died=False)
        elif event == "back" and ghosts:
            assert not end(study, store, ghosts.pop(), value=0.9)

    for event in events:
        happen(event)
        trials = study.get_trials(deepcopy=False)
        assert n_ended(trials) + len(numbers(study, STATES.RUNNING)) <= wanted
        assert sorted(t.number for own in held.values() for t in own) == numbers(
            study, STATES.RUNNING
        )
    for _ in range(500):
        happen(rng.choice(["claim", "finish", "prune"]))
    trials = study.get_trials(deepcopy=False)
    assert n_ended(trials) == wanted
    assert numbers(study, STATES.RUNNING, STATES.WAITING) == []
    assert all(t.value != 0.9 for t in trials)
    roots = [root_number(t) for t in trials if t.state in (STATES.COMPLETE, STATES.PRUNED)]
    assert len(set(roots)) == wanted, "a trial was run to its end twice"
    assert set(roots) == {root_number(t) for t in trials}, "a lost trial was not run again"


def _work(owner: str, wanted: int) -> None:
    store = open_store()
    study = optuna.load_study(study_name="s-00000000", storage=store.storage)
    study.sampler = sampler(SweepSettings(), 1000 * enroll(study, store))
    while (claimed := take(study, store, owner, wanted=wanted, at_most=2)) is not None:
        for trial in claimed:
            time.sleep(random.random() * 0.03)
            end(study, store, trial, value=trial.params["x"] if trial.number % 3 else None)
        if not claimed:
            time.sleep(0.01)
    os._exit(0)


def test_processes_that_are_killed_all_the_time_still_end_with_exactly_as_many(
    tmp_path: Path,
) -> None:
    """Real processes on a real journal, killed with signal 9 wherever they happen to be, in the middle of a claim too."""
    store, wanted, rng = open_store(), 30, random.Random(0)
    study = begin(store, wanted)
    fork = multiprocessing.get_context("fork")
    crew: dict[str, ForkProcess] = {}
    kills = started = 0
    deadline = time.monotonic() + 300
    while (ended := n_ended(study.get_trials(deepcopy=False))) < wanted:
        assert time.monotonic() < deadline
        for owner, process in list(crew.items()):
            if not process.is_alive():
                take_back_all(study, store, "killed", owner, died=False)
                del crew[owner]
        while len(crew) < 3:
            started += 1
            crew[f"w{started}"] = fork.Process(target=_work, args=(f"w{started}", wanted))
            crew[f"w{started}"].start()
        time.sleep(rng.random() * 0.05)
        if ended >= 3 * kills:
            rng.choice(list(crew.values())).kill()  # one that has just ended is no error
            kills += 1
    for owner, process in crew.items():
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        take_back_all(study, store, "killed", owner, died=False)  # as a sweep does when it ends
    trials = study.get_trials(deepcopy=False)
    assert n_ended(trials) == wanted
    assert numbers(study, STATES.RUNNING) == []
    counted = [t for t in trials if t.state in (STATES.COMPLETE, STATES.PRUNED)]
    assert len({tuple(t.params.items()) for t in counted}) == wanted, "two trials are the same"
    assert kills >= 3


def test_a_lost_trial_is_run_again_with_what_it_had(tmp_path: Path) -> None:
    store = open_store()
    study = begin(store)
    first = one(study, store)
    first.report(0.3, 1)
    take_back_all(study, store, "killed", "me")
    lost, again = study.get_trials()
    assert (lost.state, lost.user_attrs["lost"], again.state) == (
        STATES.FAIL,
        "killed",
        STATES.WAITING,
    )
    second = one(study, store, owner="other")
    assert (second.number, second.params) == (1, first.params)
    there = study.get_trials()[1]
    assert (there.intermediate_values, there.user_attrs["owner"], root_number(there)) == (
        {1: 0.3},
        "other",
        0,
    )


def test_a_trial_that_kills_its_workers_becomes_a_failure_but_stopping_is_no_death(
    tmp_path: Path,
) -> None:
    store = open_store()
    study = begin(store)
    one(study, store)
    for _ in range(2 * MAX_DEATHS):
        take_back_all(study, store, "stopped", "me", died=False)
        assert len(take(study, store) or []) == 1
    for death in range(MAX_DEATHS):
        take_back_all(study, store, "signal 9", "me")
        assert bool(numbers(study, STATES.WAITING)) == (death < MAX_DEATHS - 1)
        if numbers(study, STATES.WAITING):
            one(study, store)
    assert (
        study.get_trials()[-1].user_attrs["failed"]
        == f"its worker died {MAX_DEATHS} times; signal 9"
    )


def test_a_trial_that_a_dead_process_left_after_the_last_room_was_taken_does_not_stay(
    tmp_path: Path,
) -> None:
    """As a database leaves it that commits a killed client's trial after its lock was let go."""
    store = open_store()
    study = begin(store, 1)
    trial = one(study, store, wanted=1)
    study.ask(fixed_distributions=SPACE)  # the dead one's: no owner
    end(study, store, trial, value=1.0)
    assert take(study, store, wanted=1) is None
    assert numbers(study, STATES.RUNNING, STATES.WAITING) == []
    assert n_ended(study.get_trials()) == 1
    assert failing(study.get_trials(), 1, 0) == ""


def test_a_trial_whose_process_died_while_claiming_is_taken_back_by_the_next_claim(
    tmp_path: Path,
) -> None:
    store = open_store()
    study = begin(store)
    study.ask(fixed_distributions=SPACE)  # and no owner: it died here
    trial = one(study, store)
    assert trial.number == 1
    assert numbers(study, STATES.FAIL) == [0]
    assert trial.params == study.get_trials()[0].params


def test_the_default_is_not_lost_when_its_worker_dies_before_it_has_parameters(
    tmp_path: Path,
) -> None:
    store = open_store()
    study = begin(store)
    study.enqueue_trial({"x": 0.001, "kind": "b"})
    study.ask()
    assert one(study, store).params == {"x": 0.001, "kind": "b"}


def test_too_many_failures_stop_a_sweep_and_earlier_ones_are_forgiven(tmp_path: Path) -> None:
    store = open_store()
    study = begin(store)
    for _ in range(MAX_FAILURES - 1):
        end(study, store, one(study, store, wanted=99), failed="the loss is not finite")
    assert end(study, store, one(study, store, wanted=99), value=0.5)
    for _ in range(MAX_FAILURES - 1):
        assert failing(study.get_trials(), 99, 0) == ""
        end(study, store, one(study, store, wanted=99), failed="CUDA out of memory")
    end(study, store, one(study, store, wanted=99), failed="CUDA out of memory")
    assert "CUDA out of memory" in failing(study.get_trials(), 99, 0)
    assert failing(study.get_trials(), 99, since=len(study.get_trials())) == ""
    assert take(study, store, wanted=99) is None


def test_samplers_of_workers_do_not_repeat_each_other_nor_themselves_after_a_restart(
    tmp_path: Path,
) -> None:
    """A fixed seed would: every worker, and every restart, would draw the same first points."""
    store = open_store()
    study = begin(store)
    drawn = []
    for _ in range(6):  # workers, or restarts, before any trial has ended
        seed = 1000 * enroll(study, store) + len(study.get_trials())
        mine = optuna.load_study(
            study_name="s-00000000", storage=store.storage, sampler=sampler(SweepSettings(), seed)
        )
        drawn.append(one(mine, store, wanted=99).params["x"])
    assert len(set(drawn)) == 6
    assert enroll(study, store) == 6
