"""Sweeps end to end on the tiny study, in this process."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from click.testing import CliRunner
from optuna.trial import FrozenTrial, TrialState

from emadapt.cli import main
from emadapt.study.study import Study, load_study
from emadapt.sweep.claims import claim, failing, n_ended
from emadapt.sweep.run import Order, _check, _open
from emadapt.sweep.space import Target, search_space, study_at
from emadapt.sweep.storage import open_store
from emadapt.sweep.trial import Sweep, _reason, run_trials
from emadapt.sweep.worker import pruner, sampler
from emadapt.training.train import train_unit
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
    study.sampler, study.pruner = (
        sampler(config.sweep, 0),
        pruner(config.sweep, config.train.epochs),
    )
    sweep, space = Sweep(study, store, config, target), search_space(config, target)
    while (
        claimed := claim(
            study, store, space, "me", wanted=trials, at_most=config.sweep.stack, since=0
        )
    ) is not None:
        run_trials(sweep, claimed)
    return study.get_trials()


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_a_trial_is_the_unit_that_promoting_it_would_train_and_never_sees_the_test_slices(
    tmp_path: Path, target: Target
) -> None:
    """The test slices are blacked out for the sweep; the unit is trained with them in place."""
    params = settings() | {
        "sweep": {"stack": 1, "blocks": ["auto", [2, 3]], "head": ["linear", "pyramid"]}
    }
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
    assert not list(Path("scratch/sweeps").glob("*/trial-*")), (
        "checkpoints of ended trials are left"
    )
    assert not set(Path("build/units").iterdir()) - {Path("build/units") / unit.name}


def test_a_frozen_sweep_trains_its_heads_together_and_scores_as_one_by_one(tmp_path: Path) -> None:
    config = make_study(
        tmp_path,
        settings(precision="fp32")
        | {"sweep": {"stack": 4, "pruner": "none", "head": ["linear", "pyramid"]}},
    )
    for trial in sweep_here(config, FROZEN, 3):
        changed, unit = study_at(config, FROZEN, trial.params)
        card = json.loads((train_unit(changed, unit) / "model.json").read_text())
        assert trial.value == pytest.approx(card["val"]["iou"], abs=0.02)
    assert len(list(Path("scratch/tokens").glob("*/manifest.json"))) == 2, (
        "trials share one cache: a plain and an augmented view"
    )


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_a_trial_that_diverges_fails_with_the_reason_and_does_not_count(
    tmp_path: Path, monkeypatch, target: Target
) -> None:
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


def test_a_gpu_that_fails_ends_the_worker_and_not_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later trial of that process would fail too; a fresh one runs it again."""

    def broken(*given: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("emadapt.sweep.trial.prepare", broken)
    with pytest.raises(torch.AcceleratorError):
        sweep_here(make_study(tmp_path), LORA, 1)
    store = open_store()
    (name,) = optuna.get_all_study_names(store.storage)
    (trial,) = optuna.load_study(study_name=name, storage=store.storage).get_trials()
    assert (trial.state, "failed" in trial.user_attrs) == (TrialState.RUNNING, False)


def test_hopeless_trials_are_pruned(tmp_path: Path) -> None:
    """Five that can learn, then two that cannot: the median pruner ends those early."""
    params = settings(epochs=4, steps_per_epoch=4, val_slices=1) | {
        "sweep": {"stack": 1, "head": ["linear"]}
    }
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
        study.add_trial(
            optuna.create_trial(
                params=params, distributions=search_space(config, target), value=value
            )
        )


def test_promoting_adds_a_regime_and_leaves_every_other_line_as_it_was(tmp_path: Path) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    config = load_study()
    point = {
        "head_lr": 0.00123456,
        "rank": 8,
        "alpha_ratio": 0.5,
        "dropout": 0.1,
        "adapter_lr": 0.002,
    }
    finished(config, LORA, {0.7: point, 0.6: {**point, "rank": 4}})
    result = CliRunner().invoke(main, ["sweep", "promote"])
    assert result.exit_code == 0, result.output
    assert "study 'tiny' has 12 units now, 8 before" in result.output
    before, after = PARAMS.splitlines(), Path("params.yaml").read_text().splitlines()
    assert [line for line in before if line not in after] == [
        "  regimes: [frozen, lora]   # the default ones"
    ]
    new = [line for line in after if line not in before]
    assert new[0].startswith("  regimes: [frozen, lora, lora_tuned]")
    assert new[0].endswith("# the default ones")
    assert len(new) == 2
    assert "of sweep tiny-t-lora-a-" in new[1]
    assert "validation IoU 0.7000" in new[1]
    tuned = load_study().regime_settings["lora_tuned"]
    expected = dataclasses.replace(
        config.regime_settings["lora"],
        rank=8,
        alpha=4.0,
        dropout=0.1,
        head_lr=0.00123,
        adapter_lr=0.002,
    )
    assert tuned == expected
    again = CliRunner().invoke(main, ["sweep", "promote"])
    assert again.exit_code == 2
    assert "regime 'lora_tuned': found there already" in again.output
    assert CliRunner().invoke(main, ["sweep", "promote", "--as", "second"]).exit_code == 0


def test_promoting_blocks_and_scale_makes_a_backbone_too(tmp_path: Path) -> None:
    make_study(tmp_path)
    Path("params.yaml").write_text(PARAMS + "sweep: {blocks: [auto, [1, 4]], scale: [1.0, 1.5]}\n")
    config = load_study()
    finished(
        config,
        FROZEN,
        {
            0.7: {
                "head_lr": 1e-3,
                "weight_decay": 1e-3,
                "head": "linear",
                "blocks": "1-4",
                "scale": 1.5,
            }
        },
    )
    result = CliRunner().invoke(main, ["sweep", "promote", "--as", "best"])
    assert result.exit_code == 0, result.output
    after = load_study()
    assert after.backbones == ("t", "t_best")
    expected = dataclasses.replace(config.backbone_settings["t"], blocks=(1, 4), scale=1.5)
    assert after.backbone_settings["t_best"] == expected
    assert after.regime_settings["best"].head == "linear"
    assert "t_best with best" in result.output
    assert "study 'tiny' has 24 units now, 8 before" in result.output


def test_a_default_that_is_the_best_and_settings_that_changed_are_not_promoted(
    tmp_path: Path,
) -> None:
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
    assert (
        CliRunner().invoke(main, ["sweep", "status"]).output
        == "no sweep yet in scratch/sweeps/journal.log\n"
    )
    Path("params.yaml").write_text(PARAMS)
    default = {"head_lr": 1e-3, "rank": 2, "alpha_ratio": 2.0, "dropout": 0.0, "adapter_lr": 5e-4}
    finished(load_study(), LORA, {0.71234: default, 0.6: {**default, "rank": 4}})
    result = CliRunner().invoke(main, ["sweep", "status"])
    assert "0.7123" in result.output
    row = next(line for line in result.output.splitlines() if "tiny-t-lora" in line).split()
    assert row[1:7] == [
        "2",
        "0",
        "0",
        "0",
        "1",
        "0",
    ]  # done, pruned, left, run, wait (the default), fail
    assert "to go" in result.output, "the table is wider than a terminal"
    assert (
        "0.6000" in CliRunner().invoke(main, ["sweep", "status", "--name", "tiny-t-lora-a"]).output
    )
