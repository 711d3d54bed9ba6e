"""An adapter and a head for each dataset of a union, and the router that chooses between them."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emadapt.data.crops import load_epoch, plan_epoch
from emadapt.data.ingest import open_volume
from emadapt.models.closest import statistics_of
from emadapt.models.predict import predict_slices
from emadapt.models.regimes import State, merge
from emadapt.models.segmenter import Segmenter, build_segmenter, load_segmenter
from emadapt.study.study import BackboneSettings, RegimeSettings, Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.fit import Inputs, _optimiser, _step, loss_function
from emadapt.training.joint import ALIGN
from emadapt.training.train import prepare, train_unit
from tiny import blobs, make_study, settings, write_stack

NAMES = (
    "a",
    "ab",
    "train",
    "lora_b",
)  # one the beginning of another; one that torch, one that peft uses itself
LORA = {"kind": "lora", "rank": 2, "alpha": 4}
SIZE = (42, 56)


def build(kind: str, datasets: tuple[str, ...] = (), seed: int = 0) -> Segmenter:
    regime = RegimeSettings(
        kind, rank=3, k=2 * (kind == "lora_last_k"), align="routed" if datasets else ""
    )  # type: ignore[arg-type]
    return build_segmenter(
        BackboneSettings("tiny_dinov2", "random"), regime, "pyramid", seed, datasets
    ).eval()


def part_of(state: State, dataset: str) -> State:
    """What belongs to a dataset, under the names of a model that has nothing else."""
    kept = {k: v for k, v in state.items() if f".of_{dataset}." in k}
    return {
        k.replace("copies.", "").replace(f"of_{dataset}.", "").replace("vector.weight", "vector"): v
        for k, v in kept.items()
    }


IMAGES = torch.rand((2, 1, *SIZE), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(segmenter: Segmenter) -> torch.Tensor:
    return torch.as_tensor(segmenter(IMAGES, SIZE))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["frozen", "lora", "lora_last_k", "dora"])
def test_with_a_dataset_chosen_it_is_that_datasets_own_model(kind: str) -> None:
    routed, generator = build(kind, NAMES), torch.Generator().manual_seed(0)
    start, own = routed.trained_state(), build(kind).trained_state()
    for name in NAMES:  # at the start each is what a unit of that dataset alone would be
        assert part_of(start, name).keys() == own.keys()
        assert all(torch.equal(value, own[key]) for key, value in part_of(start, name).items())
    state = {k: v + 0.1 * torch.randn(v.shape, generator=generator).abs() for k, v in start.items()}
    assert (
        sum(v.numel() for v in state.values())
        == len(NAMES) * sum(v.numel() for v in own.values())
        == routed.n_trainable()
    )
    routed.load_trained(state)
    expected, single = {}, build(kind, seed=9)
    for name in NAMES:
        single.load_trained(part_of(state, name))
        expected[name] = logits(single)
    assert min(apart(a, b) for a, b in itertools.combinations(expected.values(), 2)) > 0.05
    plain = statistics_of(build("frozen"), [IMAGES])
    for fold in (False, True):
        if fold:
            merge(routed.backbone)
        for name in NAMES * 2:
            routed.use(name)
            assert apart(logits(routed), expected[name]) < 1e-3
            seen = statistics_of(routed, [IMAGES])  # as if no adapter were there
            assert all(
                apart(torch.tensor(seen[key]), torch.tensor(plain[key])) < 1e-3
                for key in ("mean", "std")
            )
            assert routed.n_trainable() == sum(v.numel() for v in state.values())
            assert apart(logits(routed), expected[name]) < 1e-3


def params() -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2, batch=4, clip=0.01)
    own["regimes"] = {
        "lora": LORA,
        "routed": LORA | {"align": "routed"},
        "heads": {"kind": "frozen", "align": "routed"},
    }
    own["train_sets"] = {"paired": ["a", "b"]}
    own["study"] |= {"regimes": ["routed", "heads"], "train_sets": ["paired"]}
    return own


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def step(inputs: Inputs, study: Study, unit: Unit, which: set[int]) -> State:
    """Trained tensors after a step on the samples of some datasets of the first batch."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    joint = ALIGN[inputs.segmenter.regime.align](
        inputs, study.train, unit, loss_function("dice_ce"), scaler
    )
    groups = _optimiser(inputs.segmenter, study.train, joint).param_groups
    optimiser = torch.optim.SGD(
        [p for group in groups for p in group["params"]], 100.0
    )  # AdamW's first step hides the scale
    draws = [d for d in plan_epoch(inputs.data.rows(), study.train, 0, 0)[0] if d.member in which]
    loss = joint.backward(next(iter(load_epoch(inputs.data, [draws], 0))), draws, len(draws), 0.0)
    _step(loss, joint, optimiser, scaler, study.train)
    return {k: v.clone() for k, v in inputs.segmenter.trained_state().items()}


def test_a_step_is_that_of_each_dataset_alone(tmp_path: Path) -> None:
    """The gradient of one dataset does not touch the other's parameters, also where gradients are clipped."""
    study = make_study(tmp_path, params())
    routed, plain = Unit("t", "routed", "paired", 0), Unit("t", "lora", "paired", 0)
    start = prepare(study, routed).segmenter.trained_state()
    both, only_a = (step(prepare(study, routed), study, routed, which) for which in ({0, 1}, {0}))
    for number, name in enumerate("ab"):
        alone = step(prepare(study, plain), study, plain, {number})
        for key, value in part_of(both, name).items():
            torch.testing.assert_close(value, alone[key], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, start[key]) for key, value in only_a.items() if ".of_b." in key)
    assert any(
        not torch.equal(value, start[key]) for key, value in only_a.items() if ".of_a." in key
    )
    assert any(not torch.equal(value, start[key]) for key, value in both.items() if ".of_b." in key)


@pytest.mark.parametrize("regime", ["routed", pytest.param("heads", marks=pytest.mark.slow)])
def test_the_router_sees_tokens_and_no_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], regime: str
) -> None:
    own = params()
    own["datasets"]["dark"] = own["datasets"]["a"]
    own["study"] |= {"datasets": ["a", "b", "dark"], "regimes": [regime]}
    write_stack(tmp_path / "data/dark", *blobs((10, 90, 100), 1))  # as b
    study = make_study(tmp_path, own)
    path = Path("build/ingest/a/image.npy")
    np.save(path, 255 - np.load(path))  # so a is bright, and b and its twin are dark
    unit = Unit("t", regime, "paired", 0)
    folder = train_unit(study, unit)
    tensors = load_file(folder / "model.safetensors")
    assert all((".of_a." in name) != (".of_b." in name) for name in tensors)
    capsys.readouterr()
    tests = json.loads(evaluate_unit(study, unit).read_text())["test"]
    assert {name: test["routed_to"] for name, test in tests.items()} == {
        "a": "a",
        "b": "b",
        "dark": "b",
    }
    assert all(
        test["distances"][test["routed_to"]] == min(test["distances"].values())
        for test in tests.values()
    )
    assert tests["dark"]["counts"] == tests["b"]["counts"]
    said = capsys.readouterr().out
    assert "a is routed to a (distances: " in said
    assert "dark is routed to b, the nearest in the training set (distances: " in said
    segmenter, _ = load_segmenter(folder)
    volume = open_volume("a")
    segmenter.domains = dict(
        zip(segmenter.domains, reversed(segmenter.domains.values()), strict=True)
    )  # a for b, b for a
    list(predict_slices(segmenter, volume, volume.split["test"]))
    assert segmenter.domain == "b"
    assert "a is routed to b, not to a (distances: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_tiny_study_from_training_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emadapt.domains.run import diagnose
    from emadapt.models.tokens import run
    from emadapt.report.report import build_report

    monkeypatch.delenv("EMADAPT_TRACKING")
    own = params()
    own["regimes"]["last"] = LORA | {"kind": "lora_last_k", "k": 2, "align": "routed"}
    own["study"]["regimes"] = ["lora", "routed", "heads", "last"]
    study = make_study(tmp_path, own)
    for name in study.datasets:
        run(study, "t", name)
    for unit in study.units():
        train_unit(study, unit)
        evaluate_unit(study, unit)
    for regime in study.regimes:
        diagnose(study, "t", regime)
    build_report(tmp_path, study)
    entries = json.loads(Path("reports/summary.json").read_text())["units"]
    assert {e["regime"] for e in entries} == set(study.regimes)
