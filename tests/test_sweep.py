"""Sweeps on the tiny study in this process: the space, the storage, trials, promoting, status."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from emadapt.cli import main
from emadapt.errors import EmadaptError, InputError
from emadapt.study.loading import load_study
from emadapt.study.regimes import LowRankSettings
from emadapt.study.study import Study
from emadapt.sweep.crew import Order
from emadapt.sweep.promote import own_values, write_regime
from emadapt.sweep.record import add_result, sweep_run
from emadapt.sweep.run import begin, full_name
from emadapt.sweep.space import (
    Target,
    check_target,
    default_point,
    regime_at,
    search_space,
    settings_hash,
    study_at,
)
from emadapt.sweep.storage import (
    FOLDER,
    find_study,
    first_number,
    mend_journal,
    n_ended,
    open_store,
    retry_lost,
)
from emadapt.sweep.worker import run_trials, work
from emadapt.tracking import store as mlflow_store
from emadapt.tracking.publish import publish
from emadapt.training.train import train_unit
from runs import runs_of
from tiny import make_study, settings

pytestmark = pytest.mark.usefixtures("tracking_off")

LORA, FROZEN = Target("t", "lora", "a"), Target("t", "frozen", "a")
LOW_RANK = ("rank", "alpha_ratio", "dropout")
MORE = {"weight_decay": [1e-4, 0.1], "head": ["linear", "pyramid"]}


def study(tmp_path: Path, sweep: dict[str, Any] | None = None, **changes: Any) -> Study:
    """The tiny study without its data."""
    params = settings() | ({"sweep": sweep} if sweep is not None else {})
    for section, values in changes.items():
        params[section] = {**params[section], **values}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return load_study(tmp_path / "params.yaml")


def begun(config: Study, target: Target, trials: int) -> optuna.Study:
    order, store = Order(target, trials), open_store()
    return begin(config, order, full_name(config, order), store)


def sweep_here(config: Study, target: Target, trials: int) -> list[FrozenTrial]:
    """A sweep with its only worker in this process, from its beginning or from where it is."""
    sweep = begun(config, target, trials)
    run_trials(config, target, sweep, 0, trials)
    return sweep.get_trials()


# -- the search space


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ({"kind": "frozen"}, {"weight_decay"}),
        ({"kind": "lora", "rank": 4, "alpha": 4.0}, {"adapter_lr", *LOW_RANK}),
        ({"kind": "lora_last_k", "k": 2}, {"adapter_lr", *LOW_RANK}),
        ({"kind": "bitfit"}, {"adapter_lr"}),
        ({"kind": "full"}, {"adapter_lr"}),
    ],
)
def test_the_regime_decides_what_is_searched_and_params_yaml_adds_to_it(
    tmp_path: Path, spec: dict[str, Any], own: set[str]
) -> None:
    plain, target = study(tmp_path, regimes={"new": spec}), Target("t", "new", "a")
    check_target(plain, target)
    assert set(search_space(plain, target)) == {"head_lr", *own}
    more = study(tmp_path, MORE, regimes={"new": spec})
    assert set(search_space(more, target)) == {"head_lr", *own, *MORE}
    if spec["kind"] != "frozen":  # the head is that of the model that it starts from
        started = study(tmp_path, MORE, regimes={"new": spec | {"warm_start": "frozen"}})
        check_target(started, target)
        assert set(search_space(started, target)) == {"head_lr", *own, "weight_decay"}


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_searched_settings_may_change_anything_else_makes_another_sweep(
    tmp_path: Path, target: Target
) -> None:
    here = settings_hash(make_study(tmp_path), target)
    searched = {"rank": 8, "alpha": 3.0} if target is LORA else {"weight_decay": 0.02}
    regime = {target.regime: {"kind": target.regime, "head_lr": 0.007, **searched}}
    how = {"pruner": "none", "seed": 7}
    for same in ({"regimes": regime}, {"sweep": how}, {"train": {"workers": 1}}):
        assert settings_hash(study(tmp_path, **same), target) == here
    for other in (
        study(tmp_path, train={"epochs": 7}),
        study(tmp_path, {"head_lr": [1e-4, 2e-2]}),
        study(tmp_path, MORE),
        study(tmp_path, train_sets={"a": ["b"]}),
        study(tmp_path, study={"seeds": [1]}),
    ):
        assert settings_hash(other, target) != here


def test_other_files_of_the_same_name_make_another_sweep(tmp_path: Path) -> None:
    """Weights, and the model folder that has the grey values to be matched."""
    make_study(tmp_path)
    Path("models/mine").mkdir(parents=True)
    files = [Path("weights.pt"), Path("models/mine/model.json")]
    backbone = settings()["backbones"]["t"] | {"source": "file", "file": "weights.pt"}
    backbone |= {"align": "histogram", "reference": "models/mine"}
    config, hashes = study(tmp_path, backbones={"t": backbone}), set[str]()
    for contents in ((b"1", b"1"), (b"22", b"1"), (b"22", b"22")):
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        hashes.add(settings_hash(config, LORA))
    assert len(hashes) == 3


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_the_default_point_is_the_study_itself(tmp_path: Path, target: Target) -> None:
    here = study(tmp_path, MORE)
    changed, unit = study_at(here, target, default_point(here, target))
    assert unit in here.units()
    assert changed.train_settings(unit) == here.train_settings(unit)
    assert default_point(study(tmp_path, {"rank": [4, 8]}), LORA) == {}, "outside the space"


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_what_promote_writes_is_read_as_the_trials_own_settings(
    tmp_path: Path, target: Target
) -> None:
    points = {
        name: st.sampled_from(choices.choices)
        if isinstance(choices, CategoricalDistribution)
        else st.floats(choices.low, choices.high)
        for name, choices in search_space(study(tmp_path, MORE), target).items()
    }

    @hypothesis_settings(
        max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(st.fixed_dictionaries(points))
    def check(point: dict[str, Any]) -> None:
        here = study(tmp_path, MORE)
        regime = regime_at(here, target, point)
        write_regime(tmp_path / "params.yaml", "tuned", own_values(regime), "why")
        assert load_study(tmp_path / "params.yaml").regime_settings["tuned"] == regime

    check()


@pytest.mark.parametrize(
    ("target", "sweep", "words"),
    [
        (Target("x", "lora", "a"), {}, r"backbone 'x'.*expected t\."),
        (Target("t", "x", "a"), {}, "regime 'x'.*expected frozen, "),
        (Target("t", "lora", "x"), {}, "train set 'x'.*expected a, paired"),
        (Target("t", "knn", "a"), {}, "kind `knn`"),
        (LORA, {"rank": [8, 4096]}, "sweep.rank: found 4096"),
    ],
)
def test_a_target_that_cannot_be_swept_is_refused(
    tmp_path: Path, target: Target, sweep: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        check_target(study(tmp_path, sweep, regimes={"knn": {"kind": "knn"}}), target)


# -- the storage


def test_a_database_that_does_not_answer_is_said_within_seconds_without_the_password() -> None:
    pytest.importorskip("psycopg2")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be used.*Connection refused") as caught:
        open_store("postgres://me:secret@127.0.0.1:9/sweeps")
    assert time.monotonic() - started < 10
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file in the way")
    with pytest.raises(InputError, match="cannot be written"):
        open_store()


@pytest.mark.parametrize(
    "rest",
    [b'{"op_code": 4, "wor', b'{"op_code": 4}', b"\0" * 4096, b"\n", b'{"op{"op_code": 4}\n{}\n'],
)
def test_a_damaged_end_of_the_journal_is_put_aside(
    tmp_path: Path, rest: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_study(tmp_path)
    sweep, journal = begun(config, LORA, 2), FOLDER / "journal.log"
    sweep.add_trial(optuna.create_trial(value=0.7))
    whole = journal.read_bytes()
    journal.write_bytes(whole + rest)
    again = find_study(open_store())
    again.add_trial(optuna.create_trial(value=0.8))
    assert journal.read_bytes().startswith(whole)
    damaged = journal.with_name("journal.log.damaged")
    assert damaged.read_bytes() == rest
    assert f"damaged, as after a crash; they are in {damaged} now" in capsys.readouterr().out
    assert [t.value for t in find_study(open_store()).get_trials()] == [None, 0.7, 0.8]
    mend_journal(journal)
    assert [t.value for t in again.get_trials()] == [None, 0.7, 0.8]


def test_one_run_at_a_time_works_on_a_sweep_in_the_journal() -> None:
    here, there = open_store(), open_store()
    again = there.alone("s")
    with (
        here.alone("s"),
        here.alone("other"),
        pytest.raises(InputError, match="another `emadapt sweep run` at work"),
        again,
    ):
        pass
    with there.alone("s"):
        pass


def test_other_data_or_settings_make_another_sweep_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_study(tmp_path)
    first = begun(config, LORA, 2)
    assert begun(config, LORA, 3).study_name == first.study_name
    assert "new sweep" not in capsys.readouterr().out
    manifest = tmp_path / "build/ingest/a/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"md5": "other"}))
    second = begun(config, LORA, 2)
    assert second.study_name != first.study_name
    assert f"than {first.study_name} has: this is a new sweep" in capsys.readouterr().out
    with pytest.raises(InputError, match="found 2 sweeps"):
        find_study(open_store(), "tiny-t-lora-a")
    assert find_study(open_store(), first.study_name).user_attrs["trials"] == 3


def test_a_lost_trial_is_queued_again_with_its_epochs_and_at_last_given_up(tmp_path: Path) -> None:
    sweep = begun(make_study(tmp_path), LORA, 4)
    for life in range(5):
        trial = sweep.ask()
        point = trial.params
        trial.set_user_attr("owner", f"machine/{life}")
        if life == 0:
            trial.report(0.5, 1)
        retry_lost(sweep, "machine/another")
        assert sweep.get_trials()[-1].state == TrialState.RUNNING
        retry_lost(sweep, f"machine/{life}")
        again = sweep.get_trials()[-1]
        if life == 3:
            assert again.state == TrialState.FAIL, "it may be what kills its process"
            break
        assert (again.state, first_number(again)) == (TrialState.WAITING, 0)
        assert (again.params, again.intermediate_values) == (point, {1: 0.5})


# -- trials


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_a_trial_is_the_unit_that_promoting_it_would_train_and_never_sees_the_test_slices(
    tmp_path: Path, target: Target
) -> None:
    """The test slices are blacked out for the sweep; the unit is trained with them in place."""
    params = settings() | {"sweep": {"head": ["linear", "pyramid"]}}
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
    assert "fixed_params" in trials[0].system_attrs, "the first trial is the default"
    for name, path in volumes.items():
        path.write_bytes(whole[name])
    for trial in trials:
        changed, unit = study_at(config, target, trial.params)
        card = json.loads((train_unit(changed, unit) / "model.json").read_text())
        assert trial.value == card["val"]["iou"]
    assert not list(FOLDER.glob("*/trial-*")), "checkpoints of ended trials are left"
    run_trials(config, target, find_study(open_store()), 0, 2)
    assert len(find_study(open_store()).get_trials()) == 2, "enough is enough"


def test_whatever_a_crash_takes_the_runs_in_mlflow_are_those_of_the_trials(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 0 loses its process; then the journal loses the end of what came after it."""
    monkeypatch.chdir(root)
    config = make_study(root, settings(epochs=1, steps_per_epoch=1, val_slices=1))
    sweep = begun(config, FROZEN, 5)
    sweep.ask()
    retry_lost(sweep)
    publish(sweep_run(config, FROZEN, sweep.study_name))
    run_trials(config, FROZEN, sweep, 0, 2)
    journal = FOLDER / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(at for at, line in enumerate(lines) if json.loads(line)["op_code"] == 4)
    journal.write_bytes(b"".join(lines[:last]) + lines[last][:9])  # 4: a new trial
    sweep = find_study(open_store())
    run_trials(config, FROZEN, sweep, 1, 5)
    run = sweep_run(config, FROZEN, sweep.study_name)
    add_result(run, sweep)
    publish(run)
    client, runs = mlflow_store.client(root), runs_of(root)
    (parent,) = [r for r in runs if "sweep.parent" in r.data.tags]
    children = {(r.data.tags["trial"], r.data.metrics["val/best_iou"]): r for r in runs[:-1]}
    for trial in sweep.get_trials(states=(TrialState.COMPLETE,)):
        child = children[str(first_number(trial)), trial.value]
        assert child.data.params["sweep.head_lr"] == str(trial.params["head_lr"])
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    said = parent.data.tags["mlflow.note.content"]
    assert all(name in said for name in sweep.get_trials()[0].params)
    assert (parent.data.tags["best.trial"], parent.data.metrics["best.val_score"]) in children
    drawn = {Path(f.path).stem for f in client.list_artifacts(parent.info.run_id, "figures")}
    assert drawn == {"optimization_history", "param_importances", "slice"}


def test_trials_that_fail_do_not_count_and_end_the_sweep_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emadapt.sweep.worker.MAX_FAILURES", 3)
    params = settings(clip=1e11, schedule="constant", warmup_steps=0, epochs=1)
    config = make_study(tmp_path, params | {"sweep": {"head_lr": [1e10, 1e11]}})
    with pytest.raises(EmadaptError, match=r"3 trials in a row failed.*the loss is not finite"):
        sweep_here(config, FROZEN, 2)
    trials = find_study(open_store()).get_trials()
    assert n_ended(trials) == 0
    assert all("the loss is not finite" in t.user_attrs["failed"] for t in trials)


def test_a_gpu_that_fails_ends_the_process_and_the_trial_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later trial of that process would fail too."""

    def broken(*given: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    config = make_study(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("emadapt.sweep.objective.prepare", broken)
        with pytest.raises(SystemExit):
            sweep_here(config, FROZEN, 1)
    (trial,) = find_study(open_store()).get_trials()
    assert (trial.state, "failed" in trial.user_attrs) == (TrialState.RUNNING, False)
    lost, again = sweep_here(config, FROZEN, 1)
    assert (lost.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert again.params == lost.params


def test_hopeless_trials_are_pruned(tmp_path: Path) -> None:
    """Five that learn, then two that hardly do: the median pruner ends those early."""
    config = make_study(tmp_path, settings(epochs=4, steps_per_epoch=4, val_slices=1))
    sweep = begun(config, FROZEN, 7)
    for rate in [1e-3] * 5 + [1e-4] * 2:
        sweep.enqueue_trial({"head_lr": rate, "weight_decay": 1e-4})
    trials = sweep_here(config, FROZEN, 8)
    assert [t.state for t in trials[:6]] == [TrialState.COMPLETE] * 6
    assert [t.state for t in trials[6:]] == [TrialState.PRUNED] * 2
    assert all(len(t.intermediate_values) < 4 for t in trials[6:])
    assert not list(FOLDER.glob("*/trial-*")), "checkpoints of ended trials are left"


# -- promote and status

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
DEFAULT = {"head_lr": 1e-3, "rank": 2, "alpha_ratio": 2.0, "dropout": 0.0, "adapter_lr": 5e-4}


def finished(config: Study, target: Target, values: dict[float, dict[str, Any]]) -> None:
    """A sweep whose trials at these points ended with these values."""
    sweep = begun(config, target, len(values))
    space: dict[str, BaseDistribution] = {**search_space(config, target)}
    for value, params in values.items():
        sweep.add_trial(optuna.create_trial(params=params, distributions=space, value=value))


def emadapt(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, words)
    return result.exit_code, result.output


def test_promoting_adds_a_regime_and_leaves_every_other_line_as_it_was(tmp_path: Path) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    config = load_study()
    point = DEFAULT | {"head_lr": 0.00123456, "rank": 8, "alpha_ratio": 0.5, "adapter_lr": 0.002}
    finished(config, LORA, {0.7: point, 0.6: {**point, "rank": 4}})
    code, said = emadapt("sweep", "promote")
    assert code == 0, said
    assert "study 'tiny' has 12 units now, 8 before" in said
    before, after = PARAMS.splitlines(), Path("params.yaml").read_text().splitlines()
    changed = [line for line in before if line not in after]
    assert changed == ["  regimes: [frozen, lora]   # the default ones"]
    new = [line for line in after if line not in before]
    assert re.match(r"  regimes: \[frozen, lora, lora_tuned\] +# the default ones", new[0])
    assert re.search(r"# trial 1 of sweep tiny-t-lora-a-\w+: validation score 0.7000", new[1])
    assert len(new) == 2
    expected = {"rank": 8, "alpha": 4.0, "head_lr": 0.00123, "adapter_lr": 0.002}
    tuned = load_study().regime_settings["lora_tuned"]
    assert tuned == config.regime_settings["lora"].changed(**expected)
    code, said = emadapt("sweep", "promote")
    assert (code, "regime 'lora_tuned': found there already" in said) == (2, True)
    finished(load_study(), LORA, {0.8: DEFAULT | {"rank": 16}})
    code, said = emadapt("sweep", "promote", "--as", "better")
    assert (code, "validation score 0.8000" in said) == (0, True)
    better = load_study().regime_settings["better"]
    assert isinstance(better, LowRankSettings)
    assert better.rank == 16


def test_a_default_that_is_the_best_and_settings_that_changed_are_not_promoted(
    tmp_path: Path,
) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    finished(load_study(), LORA, {0.7: DEFAULT, 0.6: DEFAULT | {"rank": 4}})
    assert "unchanged; its own settings are the best" in emadapt("sweep", "promote")[1]
    assert Path("params.yaml").read_text() == PARAMS
    Path("params.yaml").write_text(PARAMS.replace("epochs: 1", "epochs: 9"))
    code, said = emadapt("sweep", "promote")
    assert (code, "settings or data have changed since sweep" in said) == (2, True)


def test_a_worker_that_finds_other_settings_runs_no_trial(tmp_path: Path) -> None:
    """It replaces one that died, after somebody has edited params.yaml."""
    name = begun(make_study(tmp_path), LORA, 2).study_name
    with pytest.raises(InputError, match=f"changed since sweep {name}"):
        work(study(tmp_path, train={"epochs": 9}), name, "", 0, 2)
    assert {trial.state for trial in find_study(open_store()).get_trials()} == {TrialState.WAITING}


def test_status_counts_trials_and_ranks_them(tmp_path: Path) -> None:
    make_study(tmp_path)
    assert emadapt("sweep", "status")[1] == "no sweep yet in scratch/sweeps/journal.log\n"
    Path("params.yaml").write_text(PARAMS)
    finished(load_study(), LORA, {0.71234: DEFAULT, 0.6: DEFAULT | {"rank": 4}})
    said = emadapt("sweep", "status")[1]
    row = next(line for line in said.splitlines() if "tiny-t-lora" in line).split()
    # done, pruned, left, run, wait (the default), fail
    assert row[1:7] == ["2", "0", "0", "0", "1", "0"]
    assert "0.7123" in said
    assert "0.6000" in emadapt("sweep", "status", "--name", "tiny-t-lora-a")[1]
