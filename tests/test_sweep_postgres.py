"""Sweeps in PostgreSQL: several machines, each the session of a `sweep run` of its own."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import postgres
from emadapt.errors import InputError
from emadapt.study.sweep import SweepSettings
from emadapt.sweep import storage
from emadapt.sweep.claims import (
    beat,
    claim,
    end,
    enroll,
    n_ended,
    requeue,
    root_number,
    take_back_all,
    take_back_silent,
)
from emadapt.sweep.storage import open_store, open_sweep
from emadapt.sweep.worker import sampler
from test_sweep_claims import SPACE, STATES, numbers

pytestmark = pytest.mark.postgres


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    for server in postgres.serve(tmp_path):
        yield server.url


def _machine(url: str, owner: str, wanted: int, until: Any) -> None:
    """Opens the storage (all at once, on a fresh database), begins or finds the sweep, works.

    `until`: as many trials end, then every machine rests in the one that it has.
    """
    store = open_store(url, requeue=requeue)
    study = open_sweep(store, "s", "0" * 8, {"space": {}}, {"a": "md5"}, wanted)[0]
    study.sampler = sampler(SweepSettings(), 1000 * enroll(study, store))
    while (
        claimed := claim(study, store, SPACE, owner, wanted=wanted, at_most=2, since=0)
    ) is not None:
        for trial in claimed:
            time.sleep(random.random() * 0.2)
            while n_ended(study.get_trials(deepcopy=False)) >= until.value:
                time.sleep(0.02)
            end(study, store, trial, value=trial.params["x"] if trial.number % 3 else None)
        if not claimed:
            time.sleep(0.05)
    os._exit(0)


def test_machines_that_start_at_once_and_are_killed_end_with_exactly_as_many(url: str) -> None:
    wanted, kills, started = 24, 0, 0
    spawn = multiprocessing.get_context("fork")
    until = spawn.RawValue("i", 4)  # without a lock, which a killed one might hold
    crew: dict[str, multiprocessing.context.ForkProcess] = {}
    study, store = None, None
    deadline = time.monotonic() + 300
    while True:
        assert time.monotonic() < deadline
        while len(crew) < 4:
            started += 1
            crew[f"w{started}"] = spawn.Process(
                target=_machine, args=(url, f"w{started}", wanted, until)
            )
            crew[f"w{started}"].start()
        time.sleep(0.2)
        if store is None:
            store = open_store(url, requeue=requeue)
            study = open_sweep(store, "s", "0" * 8, {"space": {}}, {"a": "md5"}, wanted)[0]
        assert study is not None
        if (ended := n_ended(study.get_trials(deepcopy=False))) == wanted:
            break
        if ended >= until.value:
            victim = random.choice(list(crew.values()))
            if victim.exitcode is None:  # not one that was killed the round before
                victim.kill()
                kills += 1
                until.value = 4 * (kills + 1) if kills < 4 else 1000
        for owner, process in list(crew.items()):
            if process.exitcode is not None:
                assert process.exitcode in (0, -signal.SIGKILL)
                take_back_all(study, store, "killed", owner, died=False)
                del crew[owner]
    for process in crew.values():
        process.join(60)
    trials = study.get_trials(deepcopy=False)
    assert n_ended(trials) == wanted
    assert numbers(study, STATES.RUNNING, STATES.WAITING) == []
    assert (
        len(
            {tuple(t.params.items()) for t in trials if t.state in (STATES.COMPLETE, STATES.PRUNED)}
        )
        == wanted
    )
    assert kills == 4


def test_a_machine_that_falls_silent_loses_its_trial_to_another_and_cannot_tell_it_later(
    url: str, monkeypatch
) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 2)
    here, there = open_store(url, requeue=requeue), open_store(url, requeue=requeue)
    study = open_sweep(here, "s", "0" * 8, {"space": {}}, {"a": "md5"}, 2)[0]
    other = optuna.load_study(study_name=study.study_name, storage=there.storage)
    mine, its = (
        claim(s, h, SPACE, o, wanted=2, at_most=1, since=0)[0]
        for s, h, o in ((study, here, "a"), (other, there, "b"))
    )  # type: ignore[index]
    for _ in range(8):
        time.sleep(0.5)
        beat(here, mine)
    take_back_silent(study, here)
    assert numbers(study, STATES.RUNNING) == [mine.number]
    again = claim(study, here, SPACE, "a", wanted=2, at_most=5, since=0)
    assert again is not None
    assert [t.params for t in again] == [its.params]
    assert not end(other, there, its, value=1.0)
    assert end(study, here, again[0], value=0.5)
    assert end(study, here, mine, value=0.4)
    assert claim(other, there, SPACE, "b", wanted=2, at_most=1, since=0) is None
    assert sorted(root_number(t) for t in study.get_trials() if t.state == STATES.COMPLETE) == [
        0,
        1,
    ]


def test_a_wrong_database_user_or_port_is_said_without_the_password(url: str) -> None:
    for wrong in (
        url.replace("/sweeps", "/nowhere"),
        url.replace("me:", "you:"),
        url.replace("127.0.0.1:", "127.0.0.1:1"),
    ):
        started = time.monotonic()
        with pytest.raises(InputError, match=r"cannot be used|no URL") as caught:
            open_store(wrong)
        assert time.monotonic() - started < 10
        assert "secret" not in str(caught.value)


def test_a_user_who_may_not_make_tables_is_told_so(url: str) -> None:
    import psycopg2

    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE ROLE guest LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(InputError, match=r"permission denied for schema public.*may make tables"):
        open_store(url.replace("me:", "guest:"))
