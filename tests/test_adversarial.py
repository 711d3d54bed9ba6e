"""Training on several datasets with a classifier of the dataset behind a reversed gradient."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from emadapt.data.batches import load_epoch, members_of, plan_epoch
from emadapt.errors import InputError
from emadapt.models.heads import HEADS
from emadapt.study.study import Study, Unit
from emadapt.training.adversarial import (
    POSITIONS,
    AdversarialObjective,
    DomainClassifier,
    at_some_positions,
    features_of,
    last_layer,
    ramp,
    reverse,
)
from emadapt.training.inputs import Inputs
from emadapt.training.objective import LOSSES, Objective
from emadapt.training.prepare import check_processes, prepare
from emadapt.training.regimes import regime_of
from emadapt.training.train import train_unit
from tiny import make_study, settings, stop_after_an_epoch

ADVERSARIAL = {"adversarial": 0.1}
ONTO_B, PAIRED = Unit("t", "dann", "onto_b", 0), Unit("t", "dann", "paired", 0)


def params(**train: Any) -> dict[str, Any]:
    own = settings(**{"epochs": 1, "steps_per_epoch": 2, **train})
    own["regimes"]["dann"] = {"kind": "frozen", **ADVERSARIAL}
    own["train_sets"] = {"paired": ["a", "b"], "onto_b": {"datasets": ["a"], "unlabelled": ["b"]}}
    own["study"] |= {"regimes": ["frozen", "dann"], "train_sets": ["paired", "onto_b"]}
    return own


@pytest.fixture
def study(tmp_path: Path, tracking_off: None) -> Study:
    return make_study(tmp_path, params())


def objective(inputs: Inputs, weight: float | None) -> Objective:
    given = inputs, LOSSES["dice_ce"], torch.amp.GradScaler("cpu", enabled=False)
    return Objective(*given) if weight is None else AdversarialObjective(weight, *given)


def trained(study: Study, unit: Unit) -> bytes:
    return (train_unit(study, unit) / "model.safetensors").read_bytes()


def forget() -> None:
    for folder in ("scratch", "build/units"):
        shutil.rmtree(folder, ignore_errors=True)


def test_positions_belong_to_their_dataset_and_are_bounded() -> None:
    values = torch.arange(3 * 40 * 40).reshape(3, 1, 40, 40).float()
    found = at_some_positions(values, [5, 2, 5])
    assert {k: v.shape for k, v in found.items()} == {5: (POSITIONS, 1), 2: (1600, 1)}
    assert len(found[5].unique()) == POSITIONS  # without replacement
    assert set(found[2].flatten().tolist()) == set(range(1600, 3200))
    assert {int(v) // 1600 for v in found[5]} == {0, 2}


def test_the_gradient_is_reversed() -> None:
    values = torch.ones(3, requires_grad=True)
    assert torch.equal(reverse(values, 0.5), values)
    (reverse(values, 0.5) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-0.5, -1.0, -1.5]


def test_the_ramp_is_that_of_the_paper() -> None:
    assert ramp(0.0) == 0.0
    assert ramp(1.0) == pytest.approx((1 - np.exp(-10)) / (1 + np.exp(-10)))
    assert ramp(0.5) == pytest.approx(np.tanh(2.5))


@pytest.mark.parametrize("name", HEADS)
def test_what_enters_the_last_layer_gives_the_logits(name: str) -> None:
    head, outs = HEADS[name](8, 2).eval(), list[torch.Tensor]()
    last = last_layer(head)
    last.register_forward_hook(lambda _, __, out: outs.append(out))
    with features_of(head) as seen:
        head([torch.randn(1, 8, 4, 4) for _ in range(2)], (32, 32))
    assert len(seen) == 1
    assert torch.equal(last(seen[0]), outs[0])
    assert outs[0].shape[1] == 2


def test_the_classifier_learns_and_its_reversed_gradient_moves_features_together() -> None:
    torch.manual_seed(0)
    offset = torch.full((2, 4), 1.0, requires_grad=True)
    with torch.no_grad():
        offset[1] = -1.0
    target = torch.tensor([0] * 200 + [1] * 200)

    def gap() -> float:
        return float((offset[0] - offset[1]).detach().norm())

    def train(classifier: nn.Module, strength: float, steps: int) -> float:
        optimiser = torch.optim.Adam([*classifier.parameters(), offset], 0.02)
        for _ in range(steps):
            noise = torch.randn(
                2, 200, 4
            )  # new in each step, or the classifier learns samples by heart
            logits = classifier(reverse((noise + offset[:, None]).flatten(0, 1), strength))
            loss = nn.functional.cross_entropy(logits, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return float((logits.argmax(1) == target).float().mean())

    classifier = DomainClassifier(4, 2)
    before = gap()
    assert train(classifier, 0.0, 100) > 0.95
    assert gap() == before  # strength 0: features stay
    accuracy = train(classifier, 1.0, 120)
    assert gap() < 0.2 * before
    assert accuracy < 0.7


def test_unlabelled_images_join_each_batch_and_their_labels_are_zero(study: Study) -> None:
    inputs = prepare(study, ONTO_B)
    own = objective(inputs, 0.1)
    plan = plan_epoch(inputs.samples.rows(), inputs.train, 0, 0)
    draws = own.plan(plan, 0)
    assert [[d.member for d in batch] for batch in draws] == [[0, 0, 1, 1]] * len(plan)
    assert draws == own.plan(plan, 0) != own.plan(plan, 1)
    batches = zip(load_epoch(inputs.samples, draws, 0), draws, strict=True)
    for batch, drawn in batches:
        [(_, labels)], [members] = batch, members_of(inputs.samples, drawn)
        assert not labels[[m == 1 for m in members]].any()
    rows = [d.row for batch in own.plan([[]] * 20, 0) for d in batch]
    [n] = map(len, inputs.samples.unlabelled_rows())
    assert len(set(rows[:n])) == n, "no row twice before all were drawn once"


def test_without_weight_the_gradient_is_that_of_plain_training(study: Study) -> None:
    grads = []
    for weight in (None, 0.0):
        inputs = prepare(study, PAIRED)
        own = objective(inputs, weight)
        plan = plan_epoch(inputs.samples.rows(), inputs.train, 0, 0)
        batch = next(iter(load_epoch(inputs.samples, plan, 0)))
        loss = own.backward(batch, plan[0], len(plan[0]), 0.5)
        parameters = [p for group in inputs.segmenter.trainable().values() for p in group]
        grads.append([torch.tensor(loss), *[p.grad for p in parameters]])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_labels_of_an_unlabelled_dataset_are_never_read_and_its_images_count(study: Study) -> None:
    first = trained(study, ONTO_B)
    forget()
    path = Path("build/ingest/b/label.npy")
    np.save(path, np.random.default_rng(0).integers(0, 2, np.load(path).shape).astype(np.uint8))
    assert trained(study, ONTO_B) == first
    forget()
    np.save("build/ingest/b/image.npy", 255 - np.load("build/ingest/b/image.npy"))
    assert trained(study, ONTO_B) != first


def test_the_history_has_the_classifier_and_the_model_does_not(study: Study) -> None:
    folder = train_unit(study, PAIRED)
    history = json.loads((folder / "history.json").read_text())["epochs"]
    assert all(0 <= epoch["train/domain_accuracy"] <= 1 for epoch in history)
    assert all(name.startswith("head.") for name in load_file(folder / "model.safetensors"))
    assert trained(study, Unit("t", "frozen", "paired", 0)) != trained(study, PAIRED)


def test_stopped_and_run_again_gives_the_same_bytes(
    tmp_path: Path, tracking_off: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, params(epochs=2))
    undisturbed = trained(study, PAIRED)
    forget()
    stop_after_an_epoch(study, PAIRED, monkeypatch)
    assert trained(study, PAIRED) == undisturbed


def test_several_processes_are_refused_before_work(study: Study) -> None:
    check_processes(PAIRED, regime_of(study, Unit("t", "frozen", "paired", 0)), 2)
    with pytest.raises(InputError, match="found 2 processes; expected one"):
        check_processes(PAIRED, regime_of(study, PAIRED), 2)
