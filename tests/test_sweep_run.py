"""`emadapt sweep run` as the processes that a user starts, kills and resumes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

import postgres
from emadapt.sweep.claims import n_ended, root_number
from emadapt.sweep.storage import open_store
from tiny import make_study, settings


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "emadapt",
        "sweep",
        "run",
        "--backbone",
        "t",
        "--train-set",
        "a",
        *words,
    ]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so would ours
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def children(parent: int) -> dict[int, str]:
    """State of each process that another one has started, as `ps` has it."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found[int(stat.parent.name)] = state
    return found


def workers(parent: int) -> list[int]:
    """Workers that a `sweep run` has started."""
    found = []
    for pid in children(parent):
        with contextlib.suppress(OSError):
            if b"\0worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def trials_of(url: str = "") -> list[FrozenTrial]:
    store = open_store(url)
    names = [n for n in optuna.get_all_study_names(store.storage) if n.startswith("tiny-")]
    return (
        optuna.load_study(study_name=names[0], storage=store.storage).get_trials() if names else []
    )


def owners(trials: list[FrozenTrial]) -> set[str]:
    """Processes whose workers have claimed these trials."""
    return {t.user_attrs["owner"].split("/")[1] for t in trials if "owner" in t.user_attrs}


def wait_until(condition, process: subprocess.Popen[str], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.2)


def n_running() -> int:
    return sum(
        t.state == TrialState.RUNNING and "owner" in t.user_attrs for t in trials_of()
    )  # claimed to the end


def kill_at_work(process: subprocess.Popen[str]) -> int:
    """Kill one of two workers in the middle of a trial: a stopped one whose trial still runs beside the other's."""
    while True:
        victim = workers(process.pid)[0]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda v=victim: children(process.pid).get(v, "T") == "T", process)
        for _ in range(10):
            if n_running() == 2:
                os.kill(victim, signal.SIGKILL)
                return victim
            time.sleep(0.1)
        os.kill(victim, signal.SIGCONT)
        time.sleep(0.5)
        assert process.poll() is None, process.stdout and process.stdout.read()


def replaced(victim: int, crew: list[int]) -> bool:
    """Whether two others are at work, by one look: a dying process loses its command line first, between two looks."""
    return len(crew) == 2 and victim not in crew


def stop(process: subprocess.Popen[str], number: int) -> str:
    """Sends a signal; afterwards no process of it is left."""
    crew = list(children(process.pid))
    process.send_signal(number)
    out = process.communicate(timeout=300)[0]
    deadline = time.monotonic() + 60
    while any(
        Path(f"/proc/{pid}/stat").exists()
        and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
        for pid in crew
    ):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)
    return out


def check_sweep(trials: list[FrozenTrial], wanted: int) -> list[FrozenTrial]:
    """Exactly so many have ended, none twice, and every lost one was run again; gives those that ended."""
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(ended) == wanted
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert len({root_number(t) for t in ended}) == wanted
    assert {root_number(t) for t in trials} == {root_number(t) for t in ended}
    assert len({json.dumps(t.params, sort_keys=True) for t in ended}) == wanted
    assert all("lost" in t.user_attrs for t in trials if t.state == TrialState.FAIL)
    return ended


def check_lab_book(root: Path, trials: list[FrozenTrial], ended: list[FrozenTrial]) -> None:
    """One parent, one child a trial that ended, and each child as its trial ended."""
    from mlflow import MlflowClient

    from emadapt.tracking.tracker import tracking_uri

    client = MlflowClient(tracking_uri(root))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {
        int(r.data.tags["trial"]): r
        for r in runs
        if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert len(runs) == len(ended) + 1
    assert children.keys() == {root_number(t) for t in ended}
    for trial in ended:
        run = children[root_number(trial)]
        assert run.info.status == ("FINISHED" if trial.state == TrialState.COMPLETE else "KILLED")
        if trial.state == TrialState.COMPLETE:
            assert run.data.metrics["val/best_iou"] == trial.value
        curve = client.get_metric_history(run.info.run_id, "val/iou")
        assert len({m.step for m in curve}) == len(curve), "an epoch stands twice in a resumed run"
    best = max(t.value for t in ended if t.state == TrialState.COMPLETE and t.value is not None)
    assert parent.data.metrics["best.val_iou"] == best
    assert parent.info.status == "FINISHED"
    figures = {a.path for a in client.list_artifacts(parent.info.run_id, "figures")}
    assert {"figures/history.png", "figures/importance.png"} <= figures


@pytest.mark.slow
def test_killed_stopped_and_resumed_a_sweep_ends_with_exactly_its_trials(tmp_path: Path) -> None:
    """24 LoRA trials, two workers: one killed with signal 9, then Ctrl-C, then the sweep itself killed, then to the end."""
    make_study(tmp_path, settings(epochs=3, steps_per_epoch=6))
    words, on = ("--trials", "24", "--workers", "2"), {"EMADAPT_TRACKING": "on"}
    first = start(*words, **on)
    wait_until(lambda: n_running() == 2, first)
    victim = kill_at_work(first)
    wait_until(lambda: replaced(victim, workers(first.pid)), first)
    assert any("signal 9" in t.user_attrs.get("lost", "") for t in trials_of()), [
        (t.state, t.user_attrs) for t in trials_of()
    ]
    wait_until(lambda: n_ended(trials_of()) >= 6, first)
    out = stop(first, signal.SIGINT)
    assert first.returncode == 130, out
    assert "run it again to go on" in out
    assert not [t for t in trials_of() if t.state == TrialState.RUNNING]
    second = start(*words, **on)
    wait_until(lambda: n_ended(trials_of()) >= 9, second)
    stop(second, signal.SIGKILL)
    third = start(*words, **on)
    out = third.communicate(timeout=1200)[0]
    assert third.returncode == 0, out
    ended = check_sweep(trials_of(), 24)
    check_lab_book(tmp_path, trials_of(), ended)
    assert "fixed_params" in trials_of()[0].system_attrs, "the first trial is the default"
    fourth = start(*words, **on)
    assert fourth.communicate(timeout=600)
    assert fourth.returncode == 0
    assert len(check_sweep(trials_of(), 24)) == 24


@pytest.mark.slow
def test_workers_that_cannot_work_end_the_sweep_with_the_reason(tmp_path: Path) -> None:
    make_study(tmp_path)
    process = start(
        "--trials",
        "2",
        PYTHONSTARTUP="",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        EMADAPT_TRACKING="off",
    )
    wait_until(lambda: bool(workers(process.pid)), process)
    (tmp_path / "params.yaml").write_text("study: broken")
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 2
    assert "workers died at once" in out or "trials failed" in out


@pytest.mark.slow
def test_a_sweep_on_a_gpu_that_is_not_there_does_not_run_on_the_cpu(tmp_path: Path) -> None:
    make_study(tmp_path)
    process = start("--trials", "2", "--gpus", "1000", EMADAPT_TRACKING="off")
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 2
    assert "devices 1000: found 0 GPUs that work; expected 1" in out
    assert not n_ended(trials_of())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[postgres.Server]:
    yield from postgres.serve(tmp_path)


@pytest.mark.postgres
def test_two_machines_with_two_workers_each_on_postgresql_and_two_workers_killed(
    tmp_path: Path, server: postgres.Server
) -> None:
    url = server.url
    make_study(tmp_path, settings(epochs=3, steps_per_epoch=6))
    words = ("--trials", "16", "--workers", "2")
    one = start(*words, EMADAPT_TRACKING="on", EMADAPT_SWEEP_STORAGE=url)
    two = start(*words, "--join", EMADAPT_TRACKING="on", EMADAPT_SWEEP_STORAGE=url)
    for machine in (one, two):
        wait_until(
            lambda m=machine: len(workers(m.pid)) == 2 and str(m.pid) in owners(trials_of(url)),
            machine,
        )
        os.kill(workers(machine.pid)[0], signal.SIGKILL)
    outs = [machine.communicate(timeout=1200)[0] for machine in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outs
    trials = trials_of(url)
    ended = check_sweep(trials, 16)
    assert sum("signal 9" in t.user_attrs.get("lost", "") for t in trials) <= 2
    assert owners(ended) == {str(one.pid), str(two.pid)}, "both machines worked"
    assert yaml.safe_load(Path("params.yaml").read_text())
    check_lab_book(tmp_path, trials, ended)


@pytest.mark.postgres
def test_a_database_that_goes_away_for_a_while_is_waited_for(
    tmp_path: Path, server: postgres.Server
) -> None:
    make_study(tmp_path, settings(epochs=3, steps_per_epoch=6))
    process = start("--trials", "6", EMADAPT_SWEEP_STORAGE=server.url)
    wait_until(lambda: n_ended(trials_of(server.url)) >= 1, process)
    server.stop()
    time.sleep(10)
    assert process.poll() is None, process.communicate()[0]
    server.start()
    out = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, out
    assert "waiting for it" in out
    assert "secret" not in out
    check_sweep(trials_of(server.url), 6)
