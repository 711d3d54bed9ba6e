"""Training on several datasets with a penalty, or with normalisation layers of each: from the settings to the report."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emadapt.data.crops import load_epoch, plan_epoch
from emadapt.errors import ConfigError, InputError
from emadapt.models import parallel
from emadapt.models.segmenter import load_segmenter
from emadapt.study.study import RegimeSettings, Study, Unit, not_default
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.fit import loss_function
from emadapt.training.joint import ALIGN, POSITIONS, Penalised, at_some_positions, coral, members_of
from emadapt.training.train import prepare, train_unit
from tiny import blobs, make_study, settings, stop_after_an_epoch, write_stack

LORA = {"kind": "lora", "rank": 2, "alpha": 4}


def params(**regimes: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2)
    own["regimes"] |= {
        "coral": LORA | {"align": "coral"},
        "dann": {"kind": "frozen", "align": "adversarial"},
        **regimes,
    }
    own["train_sets"] = {"paired": ["a", "b"], "onto_b": {"datasets": ["a"], "unlabelled": ["b"]}}
    own["study"] |= {
        "regimes": ["frozen", "coral", "dann", *regimes],
        "train_sets": ["paired", "onto_b"],
    }
    return own


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def trained(study: Study, regime: str, train_set: str) -> bytes:
    return (train_unit(study, Unit("t", regime, train_set, 0)) / "model.safetensors").read_bytes()


def forget() -> None:
    for folder in ("scratch", "build/units"):
        shutil.rmtree(folder, ignore_errors=True)


def test_coral_is_the_formula_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 7)), rng.normal(size=(80, 7)) @ rng.normal(size=(7, 7))

    def covariance(
        x: np.ndarray,
    ) -> np.ndarray:  # equation 2 and 3: (D'D - (1'D)'(1'D) / n) / (n - 1)
        total = x.sum(0, keepdims=True)
        return np.asarray((x.T @ x - total.T @ total / len(x)) / (len(x) - 1))

    expected = ((covariance(a) - covariance(b)) ** 2).sum() / (4 * 7**2)
    assert float(coral(torch.tensor(a), torch.tensor(b))) == pytest.approx(expected, rel=1e-10)
    assert float(coral(torch.tensor(a), torch.tensor(a[::-1] + 3.0))) == pytest.approx(
        0, abs=1e-24
    )  # means do not count


def test_corals_gradient_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (6, 9)
    )
    assert torch.autograd.gradcheck(coral, (a, b))


def test_positions_belong_to_their_dataset_and_are_bounded() -> None:
    values = torch.arange(3 * 40 * 40).reshape(3, 1, 40, 40).float()
    found = at_some_positions(values.half(), [5, 2, 5])
    assert {k: v.shape for k, v in found.items()} == {5: (POSITIONS, 1), 2: (1600, 1)}
    assert all(v.dtype == torch.float32 for v in found.values())
    found = at_some_positions(values, [5, 2, 5])
    assert len(found[5].unique()) == POSITIONS  # without replacement
    assert set(found[2].flatten().tolist()) == set(range(1600, 3200))
    assert {int(v) // 1600 for v in found[5]} == {0, 2}


def test_groups_know_the_dataset_of_each_sample(tmp_path: Path) -> None:
    """Datasets of two shapes; the intensity of an image says where it is from."""
    own = params()
    own["backbones"]["t"]["tile"] = 0
    own["train"] |= {"augment": False, "batch": 4}
    own["backbones"]["t"]["views"] = 0
    write_stack(tmp_path / "data/c", *blobs((10, 70, 80), 2))
    own["datasets"]["c"] = own["datasets"]["a"]
    own["study"]["datasets"] = ["a", "b", "c"]
    own["train_sets"]["paired"] = {"datasets": ["c", "a"], "unlabelled": ["b"]}
    study = make_study(tmp_path, own)
    for name, value in {"a": 10, "b": 20, "c": 30}.items():
        path = tmp_path / f"build/ingest/{name}/image.npy"
        np.save(path, np.full_like(np.load(path), value))
    inputs = prepare(study, Unit("t", "coral", "paired", 0))
    train = study.train
    joint = ALIGN["coral"](
        inputs,
        train,
        Unit("t", "coral", "paired", 0),
        loss_function("dice"),
        torch.amp.GradScaler("cpu"),
    )
    plan = plan_epoch(inputs.data.rows(), train, 0, 0)
    assert {d.member for batch in plan for d in batch} == {0, 1}
    draws = joint.plan(plan, 0)
    assert [[d.member for d in batch] for batch in draws] == [
        [d.member for d in batch] + [2, 2] for batch in plan
    ]
    assert draws == joint.plan(plan, 0) != joint.plan(plan, 1)
    for batch, drawn in zip(load_epoch(inputs.data, draws, 0), draws, strict=True):
        for (images, labels), members in zip(batch, members_of(inputs.data, drawn), strict=True):
            assert [round(float(i.median()) * 255) for i in images] == [
                (30, 10, 20)[m] for m in members
            ]
            assert not labels[[m == 2 for m in members]].any()
        assert len(batch) == 2


def test_a_row_of_an_unlabelled_dataset_comes_again_after_all_others(tmp_path: Path) -> None:
    study = make_study(tmp_path, params())
    inputs = prepare(study, Unit("t", "coral", "onto_b", 0))
    joint = ALIGN["coral"](
        inputs,
        study.train,
        Unit("t", "coral", "onto_b", 0),
        loss_function("dice"),
        torch.amp.GradScaler("cpu"),
    )
    rows = [d.row for batch in joint.plan([[]] * 5, 0) for d in batch]
    n = len(inputs.unlabelled[0].split["train"])
    assert set(rows[:n]) == set(inputs.unlabelled[0].split["train"])
    assert len(rows) == 10  # two a batch, as of the labelled one


def test_without_a_penalty_the_gradient_is_that_of_training_without_align(tmp_path: Path) -> None:
    study = make_study(tmp_path, params())
    grads = []
    for name in ("", "coral"):
        inputs = prepare(study, Unit("t", "coral", "paired", 0))
        joint = ALIGN[name](
            inputs,
            study.train,
            Unit("t", "coral", "paired", 0),
            loss_function("dice_ce"),
            torch.amp.GradScaler("cpu", enabled=False),
        )
        if isinstance(joint, Penalised):
            joint.weight = 0.0
        plan = plan_epoch(inputs.data.rows(), study.train, 0, 0)
        loss = joint.backward(
            next(iter(load_epoch(inputs.data, plan, 0))), plan[0], len(plan[0]), 0.5
        )
        trained = [p for group in inputs.segmenter.trainable().values() for p in group]
        grads.append([torch.tensor(loss), *[p.grad for p in trained]])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("regime", ["coral", "dann"])
def test_labels_of_an_unlabelled_dataset_are_never_read(tmp_path: Path, regime: str) -> None:
    study = make_study(tmp_path, params())
    first = trained(study, regime, "onto_b")
    forget()
    path = Path("build/ingest/b/label.npy")
    np.save(path, np.random.default_rng(0).integers(0, 2, np.load(path).shape).astype(np.uint8))
    assert trained(study, regime, "onto_b") == first
    if regime == "coral":
        return
    forget()
    image = np.load("build/ingest/b/image.npy")
    np.save("build/ingest/b/image.npy", 255 - image)
    assert trained(study, regime, "onto_b") != first, "its images do count"


def test_a_penalty_changes_the_model_and_is_in_the_history(tmp_path: Path) -> None:
    study = make_study(tmp_path, params(plain=LORA))
    assert trained(study, "coral", "paired") != trained(study, "plain", "paired")
    history = json.loads(Path("build/units/t-coral-paired-0/history.json").read_text())["epochs"]
    assert all(epoch["train/coral"] > 0 for epoch in history)
    trained(study, "dann", "paired")
    folder = Path("build/units/t-dann-paired-0")
    history = json.loads((folder / "history.json").read_text())["epochs"]
    assert all(0 <= epoch["train/domain_accuracy"] <= 1 for epoch in history)
    assert all(name.startswith("head.") for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("regime", ["dann", "norm", "routed"])
def test_stopped_and_run_again_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regime: str
) -> None:
    own = params()
    own["train"]["epochs"] = 2
    if regime != "dann":
        kind = LORA if regime == "routed" else {"kind": "frozen"}
        own["regimes"][regime] = {**kind, "align": regime, "head": "linear"}
        own["study"] |= {"regimes": [regime], "train_sets": ["paired"]}
    study = make_study(tmp_path, own)
    undisturbed = trained(study, regime, "paired")
    shutil.rmtree("scratch/units")
    shutil.rmtree("build/units")
    stop_after_an_epoch(study, Unit("t", regime, "paired", 0), monkeypatch)
    state = torch.load(next(tmp_path.glob("scratch/units/*/*/checkpoint.pt")), weights_only=True)
    assert state["progress"]["epoch"] == 1
    assert bool(state["joint"]) == (regime == "dann")
    assert trained(study, regime, "paired") == undisturbed


def norm_params(**regime: Any) -> dict[str, Any]:
    own = params()
    own["regimes"]["norm"] = {"kind": "frozen", "align": "norm"} | regime
    own["study"] |= {"regimes": ["norm"], "train_sets": ["paired"], "datasets": ["a", "b", "dark"]}
    own["datasets"]["dark"] = own["datasets"]["a"]
    return own


@pytest.mark.parametrize(
    "regime",
    [
        pytest.param({}, id="frozen"),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param({"kind": "unet2d"}, id="unet2d", marks=pytest.mark.slow),
        pytest.param(
            {"kind": "resunet3d", "patch": [2, 32, 32], "channels": [2] * 5},
            id="resunet3d",
            marks=pytest.mark.slow,
        ),
        pytest.param({"head": "linear"}, id="linear", marks=pytest.mark.slow),
    ],
)
def test_an_unknown_dataset_takes_the_layers_of_the_nearest(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    regime: dict[str, Any],
) -> None:
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    image, label = blobs((10, 90, 100), 1)  # as b
    write_stack(tmp_path / "data/dark", image, label)
    study = make_study(tmp_path, norm_params(**regime))
    path = Path("build/ingest/a/image.npy")
    np.save(path, 255 - np.load(path))  # so a is bright, and b and its twin are dark
    unit = Unit("t", "norm", "paired", 0)
    folder = train_unit(study, unit)
    segmenter, card = load_segmenter(folder)
    assert set(segmenter.domains) == set(card["domains"]) == {"a", "b"}
    assert all(len(own["mean"]) == len(own["std"]) > 0 for own in segmenter.domains.values())
    capsys.readouterr()
    metrics = json.loads(evaluate_unit(study, unit).read_text())["test"]
    assert {name: m["normalised_as"] for name, m in metrics.items()} == {
        "a": "a",
        "b": "b",
        "dark": "b",
    }
    assert metrics["dark"]["iou"] == metrics["b"]["iou"]
    assert (
        "dark is not a dataset of the training set: normalised as b, the nearest"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_tiny_study_from_training_to_the_report(tmp_path: Path) -> None:
    from emadapt.domains.run import diagnose
    from emadapt.report.report import build_report

    own = params()
    own["regimes"]["norm"] = LORA | {"align": "norm"}
    own["study"] |= {"regimes": ["coral", "dann", "norm"], "train_sets": ["paired"]}
    study = make_study(tmp_path, own)
    for unit in study.units():
        train_unit(study, unit)
        evaluate_unit(study, unit)
    for regime in study.regimes:
        diagnose(study, "t", regime)
    build_report(tmp_path, study)
    entries = json.loads(Path("reports/summary.json").read_text())["units"]
    assert {e["regime"] for e in entries} == {"coral", "dann", "norm"}


def test_settings_of_units_without_align_are_what_they_were(tmp_path: Path) -> None:
    study = make_study(tmp_path, params(plain=LORA), ingested=False)
    described = not_default(study.describe(Unit("t", "plain", "paired", 0)))
    assert described["regime"] == LORA
    assert set(described) == {"unit", "backbone", "regime", "train", "split", "datasets"}
    control = not_default(study.describe(Unit("t", "plain", "onto_b", 0)))
    assert set(control) == set(described)
    assert set(control["datasets"]) == {"a"}
    assert dataclasses.replace(RegimeSettings("frozen"), align="coral").penalised


@pytest.mark.parametrize(
    ("regime", "train_set", "words"),
    [
        (
            {"align": "coral"},
            ["a"],
            r"align: found 'coral', which needs a second dataset.*train_sets.bad has \['a'\]",
        ),
        (
            {"align": "norm"},
            {"datasets": ["a"], "unlabelled": ["b"]},
            "needs a second labelled dataset",
        ),
        (
            {},
            {"datasets": ["a"], "unlabelled": ["b"]},
            r"train_sets.bad.unlabelled: found \['b'\]; expected a regime",
        ),
        ({"align": "coral"}, {"datasets": ["a"], "unlabelled": ["a"]}, "a name stands twice"),
        (
            {"align": "coral"},
            {"datasets": ["a"], "unlabelled": ["c"]},
            "'c' is not in study.datasets",
        ),
        (
            {"align": "coral", "align_weight": 0},
            ["a", "b"],
            "align_weight: found 0.0; expected a number above 0",
        ),
        (
            {"align": "coral", "kind": "ridge"},
            ["a", "b"],
            "kind ridge with init random is not trained that way",
        ),
        ({"align": "norm", "kind": "knn"}, ["a", "b"], "kind knn"),
        (
            {"align": "norm", "head": "linear", "init": "ridge"},
            ["a", "b"],
            "kind frozen with init ridge",
        ),
        ({"align": "norm", "init_from": "frozen"}, ["a", "b"], "what belongs to a dataset"),
        ({"align": "coral", "head": "linear"}, ["a", "b"], "nothing is trained"),
        ({"align": "typo"}, ["a", "b"], "expected one of , coral, adversarial, norm, routed"),
        (
            {"align": "routed", "kind": "bitfit"},
            ["a", "b"],
            "with kind bitfit; expected frozen, or a low-rank kind",
        ),
        ({"align": "routed", "kind": "unet2d"}, ["a", "b"], "with kind unet2d"),
        ({"align": "routed"}, ["a"], "needs a second labelled dataset"),
        ({"align": "routed", "init_from": "frozen"}, ["a", "b"], "what belongs to a dataset"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, regime: dict[str, Any], train_set: Any, words: str
) -> None:
    own = params()
    own["regimes"]["bad"] = {"kind": "frozen"} | regime
    own["train_sets"]["bad"] = train_set
    own["study"] |= {"regimes": ["bad"], "train_sets": ["bad"]}
    with pytest.raises(ConfigError, match=words):
        make_study(tmp_path, own, ingested=False)


def test_whole_slices_that_turn_are_refused(tmp_path: Path) -> None:
    own = params()
    own["backbones"]["t"] |= {"tile": 0, "views": 0}
    with pytest.raises(ConfigError, match=r"regimes.coral.align.*turn their sides when augmented"):
        make_study(tmp_path, own, ingested=False)


def test_several_processes_and_sweeps_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emadapt.pipeline.repro import useful_devices
    from emadapt.sweep.space import Target, check_target

    study = make_study(tmp_path, params())
    several = {name for name, n in useful_devices(study).items() if n > 1}
    assert several == {"train@t-frozen-paired-0", "train@t-frozen-onto_b-0"}
    for regime in ("coral", "dann"):
        with pytest.raises(InputError, match=r"found `align: .*which a sweep does not search"):
            check_target(study, Target("t", regime, "paired"))
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(InputError, match=r"found 2 processes; expected one, for `align: coral`"):
        prepare(study, Unit("t", "coral", "paired", 0))
