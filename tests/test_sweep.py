"""Sweeps end to end on the tiny study: in this process, and as the processes that a user starts, kills and resumes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from click.testing import CliRunner
from optuna.trial import FrozenTrial, TrialState

import postgres
from emadapt.cli import main
from emadapt.config import Study, load_study
from emadapt.sweep.claims import claim, failing, n_ended, root_number
from emadapt.sweep.run import Order, _check, _open
from emadapt.sweep.space import Target, search_space, study_at
from emadapt.sweep.storage import open_store
from emadapt.sweep.trial import Sweep, _reason, run_trials
from emadapt.sweep.worker import pruner, sampler
from emadapt.train import train_unit
from tiny import make_study, settings

LORA, FROZEN = Target("t", "lora", "a"), Target("t", "frozen", "a")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def sweep_here(config: Study, target: Target, trials: int) -> list[FrozenTrial]:
    """A sweep with its only worker in this process, from its beginning or from where it is."""
    order, store = Order(target, trials), open_store()
    study = _open(config, order, *_check(config, order), store)
    study.sampler, study.pruner = sampler(config.sweep, 0), pruner(config.sweep, config.train.epochs)
    sweep, space = Sweep(study, store, config, target), search_space(config, target)
    while (claimed := claim(study, store, space, "me", wanted=trials, at_most=config.sweep.stack, since=0)) is not None:
        run_trials(sweep, claimed)
    return study.get_trials()


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_a_trial_is_the_unit_that_promoting_it_would_train_and_never_sees_the_test_slices(tmp_path: Path, target: Target) -> None:
    """The test slices are blacked out for the sweep; the unit is trained with them in place."""
    params = settings() | {"sweep": {"stack": 1, "blocks": ["auto", [2, 3]], "head": ["linear", "pyramid"]}}
    config = make_study(tmp_path, params)
    volumes = {name: tmp_path / f"build/ingest/a/{name}.npy" for name in ("image", "label")}
    whole = {name: path.read_bytes() for name, path in volumes.items()}
    test = json.loads((tmp_path / "build/ingest/a/manifest.json").read_text())["split"]["test"]
    for path in volumes.values():
        array = np.load(path, mmap_mode="r+")
        array[test] = 0
        array.flush()
    trials = sweep_here(config, target, 2)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 2
    for name, path in volumes.items():
        path.write_bytes(whole[name])
    for trial in trials:
        changed, unit = study_at(config, target, trial.params)
        card = json.loads((train_unit(changed, unit) / "model.json").read_text())
        assert trial.value == card["val"]["iou"]
    assert changed != config
    assert not list(Path("scratch/sweeps").glob("*/trial-*")), "checkpoints of ended trials are left"
    assert not set(Path("build/units").iterdir()) - {Path("build/units") / unit.name}


def test_a_frozen_sweep_trains_its_heads_together_and_scores_as_one_by_one(tmp_path: Path) -> None:
    config = make_study(
        tmp_path, settings(precision="fp32") | {"sweep": {"stack": 4, "pruner": "none", "head": ["linear", "pyramid"]}}
    )
    for trial in sweep_here(config, FROZEN, 3):
        changed, unit = study_at(config, FROZEN, trial.params)
        card = json.loads((train_unit(changed, unit) / "model.json").read_text())
        assert trial.value == pytest.approx(card["val"]["iou"], abs=0.02)
    assert len(list(Path("scratch/tokens").glob("*/manifest.json"))) == 2, "trials share one cache: a plain and an augmented view"


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_a_trial_that_diverges_fails_with_the_reason_and_does_not_count(tmp_path: Path, monkeypatch, target: Target) -> None:
    monkeypatch.setattr("emadapt.sweep.claims.MAX_FAILURES", 3)
    spec = {"head_lr": [1e10, 1e11], "head": ["pyramid"], "stack": 2}
    params = settings(clip=1e11, schedule="constant", warmup_steps=0, epochs=1) | {"sweep": spec}
    trials = sweep_here(make_study(tmp_path, params), target, 2)
    assert n_ended(trials) == 0
    assert all("the loss is not finite" in t.user_attrs["failed"] for t in trials)
    assert "the loss is not finite" in failing(trials, 2, 0)


def test_the_reason_for_a_full_gpu_says_what_to_do() -> None:
    said = _reason(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert said.startswith("CUDA out of memory")
    assert "sweep.stack" in said


def test_a_gpu_that_fails_ends_the_worker_and_not_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later trial of that process would fail too; a fresh one runs it again."""

    def broken(*given: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("emadapt.sweep.trial.prepare", broken)
    with pytest.raises(torch.AcceleratorError):
        sweep_here(make_study(tmp_path), LORA, 1)
    (trial,) = trials_of()
    assert (trial.state, "failed" in trial.user_attrs) == (TrialState.RUNNING, False)


def test_hopeless_trials_are_pruned(tmp_path: Path) -> None:
    """Five that can learn, then two that cannot: the median pruner ends those early."""
    params = settings(epochs=4, steps_per_epoch=4, val_slices=1) | {"sweep": {"stack": 1, "head": ["linear"]}}
    config = make_study(tmp_path, params)
    order, store = Order(FROZEN, 7), open_store()
    study = _open(config, order, *_check(config, order), store)
    for rate in [5e-3] * 5 + [1e-4] * 2:
        study.enqueue_trial({"head_lr": rate, "weight_decay": 1e-4, "head": "linear"})
    trials = sweep_here(config, FROZEN, 7)
    assert [t.state for t in trials[:5]] == [TrialState.COMPLETE] * 5
    assert [t.state for t in trials[5:]] == [TrialState.PRUNED] * 2
    assert all(len(t.intermediate_values) < 4 for t in trials[5:])


# -- promote

PARAMS = """# a study of mine
study:
  name: tiny  # short
  datasets: [a, b]
  backbones: [t]
  regimes: [frozen, lora]   # the default ones
  train_sets: [a, paired]
  seeds: [0, 1]
datasets:
  a: {layout: stack, voxel_nm: [30, 5, 5], foreground: [1]}
  b: {layout: stack, voxel_nm: [50, 5, 5], foreground: [1]}
train_sets: {a: [a], paired: [a, b]}
backbones:
  t: {arch: tiny_dinov2, source: random, tile: 64, overlap: 0.25, views: 1}  # tiny
regimes:
  frozen: {kind: frozen}
  # rank as in the paper
  lora: {kind: lora, rank: 2, alpha: 4, epochs: 1}
split: default
train: {epochs: 2, steps_per_epoch: 3, batch: 2, warmup_steps: 2}
"""


def finished(config: Study, target: Target, values: dict[float, dict[str, Any]]) -> None:
    """A sweep whose trials at these points ended with these values."""
    order, store = Order(target, len(values)), open_store()
    study = _open(config, order, *_check(config, order), store)
    for value, params in values.items():
        study.add_trial(optuna.create_trial(params=params, distributions=search_space(config, target), value=value))


def test_promoting_adds_a_regime_and_leaves_every_other_line_as_it_was(tmp_path: Path) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    config = load_study()
    point = {"head_lr": 0.00123456, "rank": 8, "alpha_ratio": 0.5, "dropout": 0.1, "adapter_lr": 0.002}
    finished(config, LORA, {0.7: point, 0.6: {**point, "rank": 4}})
    result = CliRunner().invoke(main, ["sweep", "promote"])
    assert result.exit_code == 0, result.output
    assert "study 'tiny' has 12 units now, 8 before" in result.output
    before, after = PARAMS.splitlines(), Path("params.yaml").read_text().splitlines()
    assert [line for line in before if line not in after] == ["  regimes: [frozen, lora]   # the default ones"]
    new = [line for line in after if line not in before]
    assert new[0].startswith("  regimes: [frozen, lora, lora_tuned]")
    assert new[0].endswith("# the default ones")
    assert len(new) == 2
    assert "of sweep tiny-t-lora-a-" in new[1]
    assert "validation IoU 0.7000" in new[1]
    tuned = load_study().regime_specs["lora_tuned"]
    expected = dataclasses.replace(config.regime_specs["lora"], rank=8, alpha=4.0, dropout=0.1, head_lr=0.00123, adapter_lr=0.002)
    assert tuned == expected
    again = CliRunner().invoke(main, ["sweep", "promote"])
    assert again.exit_code == 2
    assert "regime 'lora_tuned': found there already" in again.output
    assert CliRunner().invoke(main, ["sweep", "promote", "--as", "second"]).exit_code == 0


def test_promoting_blocks_and_scale_makes_a_backbone_too(tmp_path: Path) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS + "sweep: {blocks: [auto, [1, 4]], scale: [1.0, 1.5]}\n")
    config = load_study()
    finished(config, FROZEN, {0.7: {"head_lr": 1e-3, "weight_decay": 1e-3, "head": "linear", "blocks": "1-4", "scale": 1.5}})
    result = CliRunner().invoke(main, ["sweep", "promote", "--as", "best"])
    assert result.exit_code == 0, result.output
    after = load_study()
    assert after.backbones == ("t", "t_best")
    expected = dataclasses.replace(config.backbone_specs["t"], blocks=(1, 4), scale=1.5)
    assert after.backbone_specs["t_best"] == expected
    assert after.regime_specs["best"].head == "linear"
    assert "t_best with best" in result.output
    assert "study 'tiny' has 24 units now, 8 before" in result.output


def test_a_default_that_is_the_best_and_settings_that_changed_are_not_promoted(tmp_path: Path) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    default = {"head_lr": 1e-3, "rank": 2, "alpha_ratio": 2.0, "dropout": 0.0, "adapter_lr": 5e-4}
    finished(load_study(), LORA, {0.7: default, 0.6: {**default, "rank": 4}})
    result = CliRunner().invoke(main, ["sweep", "promote"])
    assert "unchanged; its own settings are the best" in result.output
    assert Path("params.yaml").read_text() == PARAMS
    Path("params.yaml").write_text(PARAMS.replace("epochs: 1", "epochs: 9"))
    result = CliRunner().invoke(main, ["sweep", "promote"])
    assert result.exit_code == 2
    assert "regime.epochs 1 there, 9 here" in result.output


def test_status_counts_and_estimates(tmp_path: Path) -> None:
    make_study(tmp_path)
    assert CliRunner().invoke(main, ["sweep", "status"]).output == "no sweep yet in scratch/sweeps/journal.log\n"
    Path("params.yaml").write_text(PARAMS)
    default = {"head_lr": 1e-3, "rank": 2, "alpha_ratio": 2.0, "dropout": 0.0, "adapter_lr": 5e-4}
    finished(load_study(), LORA, {0.71234: default, 0.6: {**default, "rank": 4}})
    result = CliRunner().invoke(main, ["sweep", "status"])
    assert "0.7123" in result.output
    row = next(line for line in result.output.splitlines() if "tiny-t-lora" in line).split()
    assert row[1:7] == ["2", "0", "0", "0", "1", "0"]  # done, pruned, left, run, wait (the default), fail
    assert "to go" in result.output, "the table is wider than a terminal"
    assert "0.6000" in CliRunner().invoke(main, ["sweep", "status", "--name", "tiny-t-lora-a"]).output


# -- processes


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "emadapt", "sweep", "run", "--backbone", "t", "--train-set", "a", *words]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours
    try:
        return subprocess.Popen(
            command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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
    return optuna.load_study(study_name=names[0], storage=store.storage).get_trials() if names else []


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
    return sum(t.state == TrialState.RUNNING and "owner" in t.user_attrs for t in trials_of())  # claimed to the end


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
    while any(Path(f"/proc/{pid}/stat").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in crew):
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

    from emadapt.tracking import tracking_uri

    client = MlflowClient(tracking_uri(root))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {int(r.data.tags["trial"]): r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
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
    assert any("signal 9" in t.user_attrs.get("lost", "") for t in trials_of()), [(t.state, t.user_attrs) for t in trials_of()]
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
    process = start("--trials", "2", PYTHONSTARTUP="", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", EMADAPT_TRACKING="off")
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
def test_two_machines_with_two_workers_each_on_postgresql_and_two_workers_killed(tmp_path: Path, server: postgres.Server) -> None:
    url = server.url
    make_study(tmp_path, settings(epochs=3, steps_per_epoch=6))
    words = ("--trials", "16", "--workers", "2")
    one = start(*words, EMADAPT_TRACKING="on", EMADAPT_SWEEP_STORAGE=url)
    two = start(*words, "--join", EMADAPT_TRACKING="on", EMADAPT_SWEEP_STORAGE=url)
    for machine in (one, two):
        wait_until(lambda m=machine: len(workers(m.pid)) == 2 and str(m.pid) in owners(trials_of(url)), machine)
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
def test_a_database_that_goes_away_for_a_while_is_waited_for(tmp_path: Path, server: postgres.Server) -> None:
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
