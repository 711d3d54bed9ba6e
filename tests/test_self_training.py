"""Self-training: a mean teacher labels images without labels, the student sees halves of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from emadapt.data.batches import plan_epoch
from emadapt.data.foreground import IGNORE
from emadapt.data.ingest import ingest
from emadapt.errors import InputError
from emadapt.study.study import Study, Unit
from emadapt.training.average import Average, copy_of
from emadapt.training.inputs import Inputs
from emadapt.training.objective import LOSSES
from emadapt.training.prepare import check_processes, prepare
from emadapt.training.regimes import regime_of
from emadapt.training.self_training import SelfTraining, blocks, in_other_light, masked, verdict
from emadapt.training.train import train_unit
from tiny import make_study, settings, stop_after_an_epoch, trained

ONTO_B, PIXELS = Unit("t", "taught", "onto_b", 0), Unit("t", "taught_lora", "onto_b", 0)


def params(**train: Any) -> dict[str, Any]:
    own = settings(**{"epochs": 1, "steps_per_epoch": 2, **train})
    own["regimes"]["taught"] = {"kind": "frozen", "self_training": 1.0}
    own["regimes"]["taught_lora"] = own["regimes"]["lora"] | {"self_training": 1.0}
    own["train_sets"] = {"a": ["a"], "onto_b": {"datasets": ["a"], "unlabelled": ["b"]}}
    own["study"] |= {"regimes": ["frozen", "taught", "taught_lora"], "train_sets": ["a", "onto_b"]}
    return own


@pytest.fixture
def study(tmp_path, tracking_off):
    return make_study(tmp_path, params())


def objective(study: Study, inputs: Inputs) -> SelfTraining:
    average = Average(0.99, copy_of(inputs.segmenter))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    regime = study.regime_settings[inputs.unit.regime]
    return SelfTraining(regime, inputs, LOSSES["dice_ce"], scaler, average)  # type: ignore[arg-type]


def forget() -> None:
    for folder in ("scratch", "build/units"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("shape", [(2, 5, 18, 20), (2, 1, 4, 18, 20)])
def test_half_of_the_blocks_are_shown_and_the_rest_is_the_mean(shape):
    images = torch.randn(shape)
    shown = blocks(images, 3)
    corner = shown[:, 0, ..., :3, :3]
    corner = (corner[:, :3] if images.dim() == 5 else corner).flatten(1)
    assert (corner == corner[:, :1]).all()
    assert 0.4 < float(blocks(torch.zeros(8, 1, 60, 60), 3).float().mean()) < 0.6
    halves = [masked(images, half) for half in (shown, ~shown)]
    mean = images.mean(tuple(range(2, images.dim())), keepdim=True).expand_as(images)
    torch.testing.assert_close(torch.where(shown, *halves), images)
    torch.testing.assert_close(torch.where(shown, *halves[::-1]), mean)


def test_another_light_keeps_the_order_of_grey_values():
    torch.manual_seed(0)
    image = torch.linspace(0, 1, 50).view(1, 1, 5, 10).repeat(4, 1, 1, 1)
    seen = in_other_light(image).flatten(1)
    assert (seen.diff(dim=1) >= 0).all()
    assert not torch.equal(seen[0], seen[1])


def test_draws_are_pairs_of_neighbours_where_sections_are_near(study):
    for unit in (ONTO_B, PIXELS):
        inputs = prepare(study, unit)
        own = objective(study, inputs)
        plan = plan_epoch(inputs.samples.rows(), inputs.train, 0, 0)
        assert own.plan(plan, 0) == own.plan(plan, 0)
        for batch, whole in zip(plan, own.plan(plan, 0), strict=True):
            assert whole[: len(batch)] == batch
            extra = whole[len(batch) :]
            assert [draw.member for draw in extra] == [1] * 2 * len(batch)
            assert extra[0::2] == extra[1::2]  # sections of 50 nm
        inputs.unlabelled[0].manifest["voxel_nm"][0] = 5.0
        found = [d for batch in own.plan(plan * 9, 0) for d in batch if d.member == 1]
        assert found[0::2] != found[1::2]
        if unit == PIXELS:
            apart = {abs(a.row - b.row) for a, b in zip(found[0::2], found[1::2], strict=True)}
            assert apart == {0, 1}


def test_shares_of_several_classes_are_drawn_to_those_of_the_labels(study):
    own, rng = objective(study, prepare(study, ONTO_B)), np.random.default_rng(0)
    taught = rng.dirichlet([0.2] * 3, (4, 90)).astype(np.float32)  # the background comes first
    wanted, found = torch.tensor([[0.4, 0.4, 0.2], [0.45, 0.3, 0.25]], dtype=torch.float64)
    own.state = {"labelled": wanted[1:], "unlabelled": found[1:]}
    labels = own._labels(torch.from_numpy(taught[..., 1:]).movedim(-1, 1))
    now = own.state["unlabelled"].numpy()
    drawn = taught * wanted.numpy() / [1 - now.sum(), *now]
    drawn /= drawn.sum(-1, keepdims=True)
    expected = np.where(drawn.max(-1) < 0.9, IGNORE, drawn.argmax(-1))
    np.testing.assert_array_equal(labels, expected)


def test_a_unit_of_several_classes(tmp_path, tracking_off):
    own = params()
    for dataset in own["datasets"].values():
        del dataset["foreground"]
        dataset["classes"] = {"disc": [1], "bar": [2]}
    study = make_study(tmp_path, own, ingested=False)
    for name in study.datasets:
        path = tmp_path / "data" / name / "label.tif"
        label = tifffile.imread(path)
        label[:, :8] = 2
        tifffile.imwrite(path, label, photometric="minisblack")
        ingest(study, name)
    folder = train_unit(study, ONTO_B)
    assert "iou.a.bar" in json.loads((folder / "model.json").read_text())["val"]
    (epoch,) = json.loads((folder / "history.json").read_text())["epochs"]
    assert 0 <= epoch["train/unlabelled_share"] <= 1


def test_the_first_epochs_are_on_labels_alone(tmp_path, tracking_off):
    study = make_study(tmp_path, params(epochs=5))
    inputs = prepare(study, ONTO_B)
    own = objective(study, inputs)
    plan = plan_epoch(inputs.samples.rows(), inputs.train, 0, 0)
    assert [own.plan(plan, epoch) == plan for epoch in range(5)] == [True] * 2 + [False] * 3


def test_labels_of_an_unlabelled_dataset_are_never_read_and_its_images_count(study):
    first = trained(study, ONTO_B)
    forget()
    path = Path("build/ingest/b/label.npy")
    np.save(path, np.random.default_rng(0).integers(0, 2, np.load(path).shape).astype(np.uint8))
    assert trained(study, ONTO_B) == first
    forget()
    np.save("build/ingest/b/image.npy", 255 - np.load("build/ingest/b/image.npy"))
    assert trained(study, ONTO_B) != first


def test_the_last_epoch_is_kept_and_a_training_set_without_images_is_plain(tmp_path, tracking_off):
    study = make_study(tmp_path, params(epochs=2))
    card = json.loads((train_unit(study, ONTO_B) / "model.json").read_text())
    assert card["best_epoch"] == 1
    train = card["settings"]["train"]
    assert (train["monitor"], train["ema"]) == ("last", 0.99)
    plain = trained(study, Unit("t", "frozen", "a", 0))
    assert trained(study, Unit("t", "taught", "a", 0)) == plain


def test_stopped_and_run_again_gives_the_same_bytes(tmp_path, tracking_off, monkeypatch):
    study = make_study(tmp_path, params(epochs=2))
    undisturbed = trained(study, PIXELS)
    forget()
    stop_after_an_epoch(study, PIXELS, monkeypatch)
    assert trained(study, PIXELS) == undisturbed


def test_several_processes_are_refused_before_work(study: Study) -> None:
    with pytest.raises(InputError, match="found 2 processes; expected one"):
        check_processes(ONTO_B, regime_of(study, ONTO_B), 2)


@pytest.mark.parametrize(
    ("shares", "width", "said"),
    [
        ((0.05, 0.06), 10.0, ""),
        ((0.06, 0.02), 10.0, "from 6.0% to 2.0%"),
        ((0.05, 0.2), 10.0, "from 5.0% to 20.0%"),
        ((0.002, 0.0004), 10.0, "almost nothing"),
        ((0.05, 0.05), 3.0, "3 pixels wide, in the labels 12"),
    ],
)
def test_the_verdict_needs_no_labels(shares, width, said):
    widths = {"train/unlabelled_width": width, "train/labelled_width": 12.0}
    epochs = [widths | {"train/unlabelled_share": share} for share in shares]
    found = verdict([{"train/loss": 1.0}, *epochs])
    assert said in found if said else found == ""
