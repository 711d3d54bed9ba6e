"""`emadapt sweep run` as the processes that a user starts, kills and resumes."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

import postgres
from emadapt.errors import InputError
from emadapt.sweep.storage import FOLDER, find_study, first_number, n_ended, open_store
from emadapt.tracking import store
from processes import alive, children, until
from runs import runs_of
from tiny import make_study, settings

pytestmark = pytest.mark.usefixtures("tracking_off")

PARAMS = settings(epochs=3, steps_per_epoch=6)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[postgres.Server]:
    yield from postgres.serve(tmp_path)


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    target = ("--backbone", "t", "--train-set", "a")
    # A shell's background job ignores Ctrl-C, and so would ours.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "emadapt", "sweep", "run", *target, *words],
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


database = functools.cache(open_store)
"""Opened once: each has connections of its own, of which a server gives a hundred."""


def trials_of(url: str = "") -> list[FrozenTrial]:
    try:
        return find_study(database(url) if url else open_store(url)).get_trials()
    except InputError:
        return []  # not begun yet


def owners(trials: list[FrozenTrial]) -> set[int]:
    """Processes that run trials now."""
    running = (t for t in trials if t.state == TrialState.RUNNING and "owner" in t.user_attrs)
    return {int(t.user_attrs["owner"].split("/")[1]) for t in running}


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    def met() -> bool:
        assert process.poll() is None, process.stdout and process.stdout.read()
        return bool(condition())

    until(met, 600)


def finish(process: subprocess.Popen[str]) -> str:
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out
    return out


def stop(process: subprocess.Popen[str], number: int) -> str:
    """Send a signal; no process is left afterwards."""
    crew = children(process.pid)
    process.send_signal(number)
    out = process.communicate(timeout=300)[0]
    until(lambda: not any(map(alive, crew)))
    return out


def check_sweep(trials: list[FrozenTrial], wanted: int, extra: int) -> list[FrozenTrial]:
    """At least so many have ended, none twice, and lost ones were run again; gives the ended."""
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert wanted <= len(ended) <= wanted + extra
    assert len({first_number(t) for t in ended}) == len(ended)
    assert len({json.dumps(t.params, sort_keys=True) for t in ended}) == len(ended)
    lost = {first_number(t) for t in trials if t.state == TrialState.FAIL}
    waiting = {first_number(t) for t in trials if t.state == TrialState.WAITING}
    assert lost - waiting <= {first_number(t) for t in ended}
    return ended


def check_runs(root: Path, ended: list[FrozenTrial]) -> None:
    """One parent in MLflow; below it each trial that ended, as it ended."""
    client, runs = store.client(root), runs_of(root)
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {
        int(r.data.tags["trial"]): r
        for r in runs
        if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert len(children) == len(runs) - 1
    assert children.keys() >= {first_number(t) for t in ended}
    for trial in ended:
        run = children[first_number(trial)]
        complete = trial.state == TrialState.COMPLETE
        assert run.info.status == ("FINISHED" if complete else "KILLED")
        if complete:
            assert run.data.metrics["val/best_iou"] == trial.value
        curve = client.get_metric_history(run.info.run_id, "val/iou")
        assert len({m.step for m in curve}) == len(curve), "an epoch is there twice"
    best = max(t.value for t in ended if t.value is not None and t.state == TrialState.COMPLETE)
    assert parent.data.metrics["best.val_score"] == best
    winner = children[int(parent.data.metrics["best.trial"])]
    assert winner.data.metrics["val/best_iou"] == best
    assert parent.info.status == "FINISHED"


@pytest.mark.slow
def test_killed_stopped_and_resumed_a_sweep_ends_with_its_trials(tmp_path: Path) -> None:
    """Two workers, one killed with signal 9; then Ctrl-C; then the sweep itself is killed."""
    make_study(tmp_path, PARAMS)
    words, on = ("--trials", "12", "--workers", "2"), {"EMADAPT_TRACKING": "on"}
    first = start(*words, **on)
    wait_until(lambda: len(owners(trials_of())) == 2, first)
    victim = min(owners(trials_of()))
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(owners(trials_of()) - {victim}) == 2, first)
    wait_until(lambda: n_ended(trials_of()) >= 3, first)
    out = stop(first, signal.SIGINT)
    assert first.returncode == 130, out
    assert "run it again to go on" in out
    assert not owners(trials_of())
    second = start(*words, **on)
    wait_until(lambda: n_ended(trials_of()) >= 6, second)
    stop(second, signal.SIGKILL)
    with (FOLDER / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # the machine went down in the middle of a line
    finish(start(*words, **on))
    ended = check_sweep(trials_of(), 12, extra=1)
    check_runs(tmp_path, ended)
    finish(start(*words, **on))
    assert len(check_sweep(trials_of(), 12, extra=1)) == len(ended)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["broken", "gpu"])
def test_workers_that_cannot_work_end_the_sweep_with_the_reason(tmp_path: Path, how: str) -> None:
    make_study(tmp_path)
    process = start("--trials", "2", *(["--gpus", "1000"] if how == "gpu" else []))
    if how == "broken":
        wait_until(lambda: children(process.pid), process)
        (tmp_path / "params.yaml").write_text("study: broken")
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 2, out
    said = "devices 1000: found 0 GPUs that work" if how == "gpu" else "params.yaml"
    assert said in out
    assert not n_ended(trials_of())


@pytest.mark.postgres
def test_two_machines_share_a_sweep_and_a_worker_is_killed(
    tmp_path: Path, server: postgres.Server
) -> None:
    make_study(tmp_path, PARAMS)
    on = {"EMADAPT_TRACKING": "on", "EMADAPT_SWEEP_STORAGE": server.url}
    machines = [start("--trials", "12", "--workers", "2", **on) for _ in range(2)]
    for machine in machines:
        pid = machine.pid
        wait_until(lambda: owners(trials_of(server.url)) & {*children(pid)}, machine)  # noqa: B023
    (victim, *_) = owners(trials_of(server.url)) & {*children(machines[0].pid)}
    os.kill(victim, signal.SIGKILL)
    for machine in machines:
        finish(machine)
    ended = check_sweep(trials_of(server.url), 12, extra=3)
    check_runs(tmp_path, ended)


@pytest.mark.postgres
def test_a_database_that_goes_away_for_a_while_is_waited_for(
    tmp_path: Path, server: postgres.Server
) -> None:
    make_study(tmp_path, PARAMS)
    process = start("--trials", "5", EMADAPT_SWEEP_STORAGE=server.url)
    wait_until(lambda: n_ended(trials_of(server.url)) >= 1, process)
    server.stop()
    time.sleep(10)
    assert process.poll() is None, process.communicate()[0]
    server.start()
    out = finish(process)
    assert "waiting for it" in out
    assert "secret" not in out
    check_sweep(trials_of(server.url), 5, extra=0)


@pytest.mark.postgres
def test_a_silent_machine_loses_its_trial_to_another(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emadapt.sweep.storage.HEARTBEAT", 1)
    monkeypatch.setattr("emadapt.sweep.storage.GRACE", 2)
    import optuna

    storage = open_store(server.url).storage
    sweep = optuna.create_study(study_name="s-00000000", storage=storage)
    lost = sweep.ask()
    x = lost.suggest_float("x", 0, 1)
    storage.record_heartbeat(lost._trial_id)  # type: ignore[attr-defined]
    time.sleep(4)
    sweep.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert [t.state for t in sweep.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]
    assert sweep.best_value == x


@pytest.mark.postgres
def test_a_wrong_database_user_or_right_is_said_without_the_password(
    server: postgres.Server,
) -> None:
    import psycopg2

    with psycopg2.connect(server.url) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE ROLE guest LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    for wrong, said in (
        (server.url.replace("/sweeps", "/nowhere"), "does not exist"),
        (server.url.replace("me:", "you:"), "does not exist"),
        (server.url.replace("me:", "guest:"), "permission denied.*may make tables"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            open_store(wrong)
        assert "secret" not in str(caught.value)
