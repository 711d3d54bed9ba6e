import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.losses import DiceCELoss, DiceLoss
from safetensors.torch import load_file

from emadapt.errors import EmadaptError
from emadapt.models.heads import HEADS
from emadapt.models.segmenter import Segmenter
from emadapt.study.loading import load_study
from emadapt.study.study import Unit
from emadapt.training.fit import Average, rate_factor
from emadapt.training.objective import LOSSES
from emadapt.training.train import train_unit
from processes import until
from tiny import build_model, make_study, settings, stop_after_an_epoch, trained

pytestmark = pytest.mark.usefixtures("tracking_off")

FROZEN, LORA = Unit("t", "frozen", "a", 0), Unit("t", "lora", "a", 0)


@pytest.mark.parametrize(
    "unit", [FROZEN, LORA, Unit("t", "lora", "paired", 0)], ids=lambda u: u.name
)
def test_a_repeated_unit_gives_the_same_bytes_and_another_seed_others(tmp_path, unit):
    study = make_study(tmp_path)
    first = trained(study, unit)
    (tmp_path / "scratch/units").rename(tmp_path / "gone")
    assert trained(study, unit) == first
    assert trained(study, Unit(unit.backbone, unit.regime, unit.train_set, 1)) != first


@pytest.mark.parametrize(
    "unit", [FROZEN, pytest.param(LORA, marks=pytest.mark.slow)], ids=lambda u: u.name
)
def test_killed_in_the_middle_and_run_again_gives_the_bytes_of_an_undisturbed_run(tmp_path, unit):
    params = settings(epochs=6, steps_per_epoch=8)
    params["regimes"]["lora"]["dropout"] = 0.1  # random numbers inside the model must resume too
    study = make_study(tmp_path, params)
    undisturbed = trained(study, unit)
    for done in ("scratch/units", "build/units"):
        (tmp_path / done).rename(tmp_path / done.replace("/", "-"))
    command = [sys.executable, "-m", "emadapt", "train", unit.name]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    until(lambda: list(tmp_path.glob("scratch/units/*/*/checkpoint.pt")), 120, every=0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "build/units" / unit.name).exists(), "it ended before it could be killed"
    assert 1 <= checkpoint(tmp_path)["progress"]["epoch"] < 6
    assert trained(study, unit) == undisturbed


def test_what_is_kept_is_the_running_average_and_a_stopped_training_goes_on_with_it(
    tmp_path, monkeypatch
):
    """Against weights recorded at each step and averaged afterwards; validation sees the average,
    the next step does not."""
    study = make_study(tmp_path, settings(epochs=2, steps_per_epoch=8, ema=0.7, val_slices=0))
    seen: list[dict[str, torch.Tensor]] = []
    step = Average.step

    def recorded(self: Average, segmenter: Segmenter, steps: int) -> None:
        seen.append({k: v.clone() for k, v in segmenter.trained_state().items()})
        step(self, segmenter, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Average, "step", recorded)
        undisturbed = trained(study, FROZEN)
    progress = checkpoint(tmp_path)["progress"]
    spec, train = study.backbone_settings["t"], study.train_settings(FROZEN)
    fresh = build_model(spec, study.regime_settings["frozen"], train.head, FROZEN.seed)
    expected = fresh.trained_state()
    for n, weights in enumerate(seen[: 8 * (progress["best_epoch"] + 1)], 1):
        keep = min(0.7, (1 + n) / (10 + n))
        expected = {k: keep * v + (1 - keep) * weights[k] for k, v in expected.items()}
    kept = load_file(tmp_path / "build/units" / FROZEN.name / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, atol=1e-6, rtol=1e-5)
    last = seen[8 * (progress["best_epoch"] + 1) - 1]
    assert any(not torch.equal(kept[k], last[k]) for k in kept)
    card = json.loads((tmp_path / "build/units" / FROZEN.name / "model.json").read_text())
    # The same weights, tiles without and with overlap.
    assert card["val"]["iou"] == pytest.approx(progress["best"], abs=0.02)
    for folder in ("scratch/units", "build/units"):
        shutil.rmtree(tmp_path / folder)
    stop_after_an_epoch(study, FROZEN, monkeypatch)
    assert trained(study, FROZEN) == undisturbed


def test_half_precision_scales_the_loss_and_goes_on_with_its_scale(tmp_path, monkeypatch):
    study = make_study(tmp_path, settings(precision="fp16"))
    undisturbed, scale = trained(study, FROZEN), checkpoint(tmp_path)["scaler"]
    assert scale["scale"] > 1
    (tmp_path / "scratch/units").rename(tmp_path / "gone")
    stop_after_an_epoch(study, FROZEN, monkeypatch)
    assert checkpoint(tmp_path)["progress"]["epoch"] == 1
    assert trained(study, FROZEN) == undisturbed
    assert checkpoint(tmp_path)["scaler"] == scale


def checkpoint(root: Path) -> dict[str, Any]:
    return dict(torch.load(next(root.glob("scratch/units/*/*/checkpoint.pt")), weights_only=True))


def test_a_head_learns_and_the_best_epoch_is_kept(tmp_path):
    study = make_study(tmp_path, settings(epochs=5, steps_per_epoch=20, head_lr=3e-3))
    folder = train_unit(study, FROZEN)
    epochs = json.loads((folder / "history.json").read_text())["epochs"]
    card = json.loads((folder / "model.json").read_text())
    assert epochs[-1]["train/loss"] < 0.7 * epochs[0]["train/loss"]
    ious = [e["val/iou"] for e in epochs]
    assert max(ious) > 0.6
    assert card["best_epoch"] == ious.index(max(ious))
    assert card["trainable_params"] == sum(
        p.numel() for p in HEADS["pyramid"](64, 4, 2).parameters()
    )
    assert card["shape"] == {"a": [10, 90, 100]}
    assert [len(card["tokens"]["a"][name]) for name in ("mean", "std", "usual")] == [64, 64, 1]
    assert 0 < card["tokens"]["a"]["usual"][0] < 0.5  # the same discs in every slice


def test_the_test_slices_are_not_looked_at(tmp_path):
    study = make_study(tmp_path)
    first = trained(study, LORA)
    for name in ("image", "label"):  # other test slices, the same md5 in the manifest
        path = tmp_path / f"build/ingest/a/{name}.npy"
        data = bytearray(path.read_bytes())
        data[-90 * 100 * 2 :] = bytes(90 * 100 * 2)
        path.write_bytes(data)
    (tmp_path / "scratch/units").rename(tmp_path / "gone")
    assert trained(study, LORA) == first


def test_patience_stops_and_a_loss_that_is_not_finite_ends_with_a_reason(tmp_path):
    still = settings(epochs=30, patience=2, head_lr=1e-12, schedule="constant", warmup_steps=0)
    study = make_study(tmp_path, still)
    folder = train_unit(study, FROZEN)
    assert len(json.loads((folder / "history.json").read_text())["epochs"]) < 30
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(settings(head_lr=1e11, clip=1e11, schedule="constant", warmup_steps=0))
    )
    with pytest.raises(EmadaptError, match=r"the loss is not finite.*lower head_lr"):
        train_unit(load_study(), FROZEN)


@pytest.mark.parametrize(("name", "theirs"), [("dice", DiceLoss), ("dice_ce", DiceCELoss)])
def test_losses_are_monais(name, theirs):
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 9), (1, 3, 8, 8)):
        logits = torch.randn(shape[0], 2, *shape[1:], generator=generator, requires_grad=True)
        label = torch.randint(0, 2, (shape[0], 1, *shape[1:]), generator=generator)
        other = logits.detach().clone().requires_grad_()
        losses = LOSSES[name](logits, label), theirs(softmax=True, to_onehot_y=True)(other, label)
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert logits.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(logits.grad, other.grad)


def test_the_learning_rate_warms_up_then_falls(tmp_path):
    study = make_study(
        tmp_path, settings(epochs=10, steps_per_epoch=10, warmup_steps=10), ingested=False
    )
    rates = [rate_factor(study.train, 10)(step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert max(rates) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] < 0.02
