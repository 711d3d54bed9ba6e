"""What a training step moves to the device. Here `meta` is one: it computes shapes alone, and
refuses what a GPU would have to wait for, such as a number that is read or a copy to the host."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emadapt.models.segmenter import Segmenter
from emadapt.study.study import Study, Unit
from emadapt.training.fit import Run
from emadapt.training.objective import Objective
from emadapt.training.prepare import prepare
from emadapt.training.regimes import regime_of
from emadapt.training.samples import TokenDataset
from emadapt.training.self_training import SelfTraining
from emadapt.training.train import train_unit
from tiny import make_study, settings, trained

FAKE = torch.device("meta")
MODULES = ("objective", "samples", "self_training")


class Copies(TorchDispatchMode):
    """Counts tensors that are copied to the fake device."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = func is torch.ops.aten._to_copy.default and kwargs.get("device") == FAKE
        self.n += moves and args[0].device != FAKE
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfers")
    params = settings(ema=0.9)
    params["regimes"] |= {
        "last": {"kind": "lora_last_k", "k": 1, "rank": 2, "alpha": 4},
        "unet": {"kind": "unet2d"},
        "taught": {"kind": "frozen", "self_training": 1.0},
    }
    params["train_sets"]["onto_b"] = {"datasets": ["a"], "unlabelled": ["b"]}
    params["study"]["train_sets"].append("onto_b")
    params["study"]["regimes"] = list(params["regimes"])
    return make_study(root, params), root


@pytest.fixture
def study(whole, monkeypatch, tracking_off):
    study, root = whole
    monkeypatch.chdir(root)
    return study


def on_the_fake_device(study: Study, unit: Unit, patch: pytest.MonkeyPatch) -> Run:
    """A training on `meta`; its weights have no values that could be copied to a file."""
    for module in MODULES:
        patch.setattr(f"emadapt.training.{module}.device", lambda: FAKE)
    patch.setattr(Segmenter, "trained_state", Segmenter.live_state)
    regime = regime_of(study, unit)
    inputs = prepare(study, unit, regime)
    inputs.segmenter.to(FAKE)
    taught = partial(SelfTraining, regime.settings)  # type: ignore[arg-type]
    return Run(inputs, Path("none"), regime.groups, taught if inputs.unlabelled else Objective)


@pytest.mark.parametrize(
    ("regime", "train_set", "copies"),
    [
        ("frozen", "a", 2),  # tokens, labels
        ("lora", "a", 2),  # images, labels
        ("unet", "a", 2),
        ("last", "a", 3),  # tokens below the cut, what enters the block at the cut, labels
        ("frozen", "paired", 2),
        ("taught", "onto_b", 2),
    ],
)
def test_a_step_copies_its_batch_to_the_device_and_waits_for_nothing(
    study, regime, train_set, copies, monkeypatch
):
    run = on_the_fake_device(study, Unit("t", regime, train_set, 0), monkeypatch)
    with Copies() as counted:
        losses = list(run.epoch())
    assert counted.n == len(losses) * copies
    with pytest.raises(RuntimeError, match="item"):
        float(losses[0])


def test_held_tokens_give_the_same_model_and_are_read_once(study, monkeypatch):
    unit = Unit("t", "last", "paired", 0)
    folder = train_unit(study, unit)
    streamed = (folder / "model.safetensors").read_bytes()
    Path("scratch/units").rename("gone")
    samples = prepare(study, unit).samples
    assert isinstance(samples, TokenDataset)
    assert not samples.on_device
    monkeypatch.setattr("emadapt.training.samples.free_bytes", lambda: 10**9)
    assert trained(study, unit) == streamed
