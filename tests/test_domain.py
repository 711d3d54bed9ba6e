"""Modules for training on several datasets, and the nearest training dataset."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from emadapt.models.closest import distances
from emadapt.models.heads import HEADS, needs_image
from emadapt.models.unet2d import UNet2d
from emadapt.training.domain_classifier import (
    Copies,
    DomainClassifier,
    features_of,
    give_copies,
    last_layer,
    ramp,
    reverse,
    use,
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: make(8, 2) for name, make in HEADS.items()} | {"unet2d": UNet2d(1, 1)}


def forward(name: str, head: nn.Module, n: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 1, 32, 32, generator=generator)
    tokens = (
        [image]
        if name == "unet2d"
        else [torch.randn(n, 8, 4, 4, generator=generator) + seed for _ in range(2)]
    )
    return torch.as_tensor(
        head(tokens, (32, 32), image) if needs_image(name) else head(tokens, (32, 32))
    )


def test_reversal_is_the_identity_forwards_and_turns_the_gradient() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    weights = torch.randn(5, 3)
    out = reverse(x, 0.25)
    assert torch.equal(out, x)
    (out * weights).sum().backward()
    assert torch.equal(x.grad, -0.25 * weights)  # type: ignore[arg-type]


def test_the_ramp_is_that_of_the_paper() -> None:
    assert ramp(0.0) == 0.0
    assert ramp(1.0) == pytest.approx((1 - np.exp(-10)) / (1 + np.exp(-10)))
    values = [ramp(p / 20) for p in range(21)]
    assert values == sorted(values)
    assert ramp(0.5) == pytest.approx(np.tanh(2.5))


@pytest.mark.parametrize("name", [*HEADS, "unet2d"])
def test_what_enters_the_last_layer_gives_the_logits(name: str) -> None:
    """The last layer on the tapped features is what the head does next, and nothing stays hooked."""
    head = heads()[name].eval()
    last = last_layer(head)
    outs: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda _, __, out: outs.append(out))
    with features_of(head) as seen:
        forward(name, head)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(last(seen[0]), outs[0])
    assert outs[0].shape[1] == 2
    forward(name, head)
    assert len(seen) == 1


@pytest.mark.parametrize("name", [*HEADS, "unet2d"])
def test_copies_are_the_shared_layer_at_the_start_and_learn_apart(name: str) -> None:
    shared = heads()[name]
    head = copy.deepcopy(shared)
    give_copies(head, ["train", "b"])
    copies = [m for m in head.modules() if isinstance(m, Copies)]
    norms = sum(
        isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d) for m in shared.modules()
    )
    assert len(copies) == norms > 0
    for dataset in ("train", "b"):
        use(head, dataset)
        assert torch.equal(forward(name, head), forward(name, shared))
        shared = heads()[name]  # the forward pass has moved running statistics
    before = {k: v.clone() for k, v in head.state_dict().items()}
    use(head, "train")
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    forward(name, head, seed=3).square().mean().backward()
    optimiser.step()
    changed = {k for k, v in head.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in changed if "of_b" in k], (
        "nothing of one dataset reaches the other's layers"
    )
    assert [k for k in changed if "of_train" in k]
    use(head.eval(), "b")
    first = forward(name, head)
    use(head, "train")
    assert not torch.equal(forward(name, head), first)


def test_a_dataset_must_be_chosen() -> None:
    head = heads()["pyramid"]
    give_copies(head, ["a", "b"])
    with pytest.raises(ValueError, match="no dataset chosen"):
        forward("pyramid", head)


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


def test_the_nearest_dataset_by_mean_or_by_spread() -> None:
    known = {
        "a": {"mean": [0.0, 0.0], "std": [1.0, 100.0]},
        "b": {"mean": [1.0, 0.0], "std": [1.0, 100.0]},
        "c": {"mean": [0.0, 0.0], "std": [2.0, 100.0]},
    }
    for name, own in known.items():
        away = distances(own, known)
        assert away[name] == 0.0
        assert min(away, key=lambda n: away[n]) == name
    away = distances({"mean": [0.9, 30.0], "std": [1.0, 100.0]}, known)
    assert min(away, key=lambda n: away[n]) == "b"  # 30 is little of a channel that deviates by 100
    one = {k: {"mean": v["mean"][:1], "std": v["std"][:1]} for k, v in known.items()}
    scale = np.mean([1.0, 1.0, 4.0])
    expected = (
        (0.9 - 0) ** 2 + (1 - 2) ** 2
    ) / scale  # Fréchet distance of one-dimensional Gaussians, in units of the scale
    assert distances({"mean": [0.9], "std": [1.0]}, one)["c"] == pytest.approx(expected)
