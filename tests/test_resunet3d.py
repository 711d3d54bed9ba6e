"""The 3D residual U-Net: its form, its units, what is refused before work."""

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from emadapt.cli import main
from emadapt.data.crops import Draw
from emadapt.data.ingest import open_volume
from emadapt.errors import ConfigError, InputError
from emadapt.models.device import emulated, resolve_precision
from emadapt.models.resunet3d import BatchNorm3d, Block, ResUNet3d
from emadapt.models.segmenter import build_segmenter, load_segmenter
from emadapt.models.tokens import run as tokens
from emadapt.pipeline.check import check_study
from emadapt.segment.model import open_model
from emadapt.study.study import RegimeSettings, Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.fit import val_slices
from emadapt.training.train import label, prepare, train_unit
from tiny import make_study, settings, stop_after_an_epoch

ROOT = Path(__file__).parents[1]
NARROW = (4, 5, 6, 7, 8)
KIND = {"kind": "resunet3d", "patch": [3, 32, 32], "channels": list(NARROW)}
UNIT = Unit("t", "deep", "a", 0)


def a_study(
    tmp_path: Path,
    *,
    regimes: dict[str, Any] | None = None,
    train_sets: dict[str, Any] | None = None,
    **train: Any,
) -> Study:
    params = settings(**{"epochs": 2, "steps_per_epoch": 2, "val_slices": 2, **train})
    params["regimes"] = regimes or {"deep": KIND}
    params["train_sets"] = train_sets or {"a": ["a"]}
    params["study"] |= {
        "regimes": list(params["regimes"]),
        "train_sets": list(params["train_sets"]),
    }
    return make_study(tmp_path, params)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, in which no backbone can be built and no token be computed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a U-Net has no backbone")

    for place in ("models.segmenter.build_backbone", "train.plain_view", "evaluate.plain_view"):
        monkeypatch.setattr(f"emadapt.{place}", refuse)
    return tmp_path


def test_shapes_of_the_levels_and_size() -> None:
    """On the paper's patch of 18 x 160 x 160, without computing it: nothing is pooled along z."""
    with torch.device("meta"):
        net = ResUNet3d(1, 1)
        seen: list[tuple[int, ...]] = []
        for module in [net.before, *net.down, *net.lift, *net.up]:
            module.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
        logits = net([torch.empty(1, 1, 18, 160, 160)], (160, 160))
    encoder = [
        (28, 18, 160, 160),
        (36, 18, 80, 80),
        (48, 18, 40, 40),
        (64, 18, 20, 20),
        (80, 18, 10, 10),
    ]
    decoder = [
        shape for shape in encoder[-2::-1] for _ in range(2)
    ]  # lifted, then through the block
    assert seen == [encoder[0], *encoder, *decoder]
    assert logits.shape == (1, 2, 18, 160, 160)
    widths = (28, 36, 48, 64, 80)

    def block(
        a: int, b: int
    ) -> int:  # weights without biases; scale and shift of the normalisation
        return 9 * a * b + 2 * 27 * b * b + 3 * 2 * b

    expected = 25 * 28 + 2 * 28 + block(28, 28) + 25 * 28 * 2 + 2
    expected += sum(block(a, b) + block(a, a) + a * b + a for a, b in pairwise(widths))
    assert (
        sum(p.numel() for p in net.parameters()) == expected == 1_459_022
    )  # what docs/how-to.md says
    assert [
        m.kernel_size for m in net.modules() if isinstance(m, nn.Conv3d) and 5 in m.kernel_size
    ] == [(1, 5, 5)] * 2


@pytest.mark.parametrize("place", ["train", "backbones.t"])
def test_half_precision_that_this_cpu_emulates_is_refused_before_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asked = "bf16" if place == "train" else "fp16"
    params = settings(precision=asked if place == "train" else "auto")
    params["backbones"]["t"]["precision"] = "auto" if place == "train" else asked
    params["regimes"], params["train_sets"] = {"deep": KIND}, {"a": ["a"]}
    params["study"] |= {"regimes": ["deep"], "train_sets": ["a"]}
    study = make_study(here, params)
    monkeypatch.setattr(
        "emadapt.models.device.emulated", lambda precision: precision in ("bf16", "fp16")
    )
    assert resolve_precision("auto") == "fp32" or torch.cuda.is_available()
    words = rf"{place}.precision: found {asked} without a GPU.*Set auto"
    assert [line for line in check_study(here / "params.yaml") if re.search(words, line)]
    with pytest.raises(InputError, match=words):
        prepare(study, UNIT)
    monkeypatch.setattr("emadapt.models.device.emulated", lambda _: False)
    assert check_study(here / "params.yaml") == []


def test_what_is_emulated_is_never_chosen() -> None:
    assert not emulated("fp32")
    assert not emulated(resolve_precision("auto"))


def test_a_block_is_three_convolutions_and_a_sum() -> None:
    torch.manual_seed(0)
    block = Block(2, 3).train()
    x = torch.randn(2, 2, 4, 6, 5)
    weights = [p for p in block.parameters() if p.dim() == 5]
    assert [tuple(w.shape) for w in weights] == [(3, 2, 1, 3, 3), (3, 3, 3, 3, 3), (3, 3, 3, 3, 3)]

    def normal(y: torch.Tensor) -> torch.Tensor:
        flat = y.transpose(0, 1).flatten(1)
        return (y - flat.mean(1).view(1, -1, 1, 1, 1)) / (
            flat.var(1, correction=0) + 1e-5
        ).sqrt().view(1, -1, 1, 1, 1)

    # In plane: each slice through a 2D convolution by itself.
    plane = torch.stack([F.conv2d(x[:, :, z], weights[0][:, :, 0], padding=1) for z in range(4)], 2)
    first = F.elu(normal(plane))
    second = F.elu(normal(F.conv3d(first, weights[1], padding=1)))
    expected = F.elu(normal(F.conv3d(second, weights[2], padding=1)) + first)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_normalisation_over_processes_is_torchs_over_all_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What several processes compute, here with sums over one that has all samples."""
    monkeypatch.setattr("emadapt.models.parallel.size", lambda: 2)
    monkeypatch.setattr("emadapt.models.parallel.total", lambda values: values)
    ours, theirs = BatchNorm3d(3), nn.BatchNorm3d(3)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 5, 6, generator=generator) * 3 + 1 for _ in range(2))
    grads = []
    for norm in (ours, theirs):
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (out * y).sum().backward()
        grads.append((out, inputs.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_of_it_and_neighbours_matter() -> None:
    torch.manual_seed(0)
    net = ResUNet3d(1, 1, NARROW)
    image = torch.rand(2, 1, 3, 32, 32, requires_grad=True)
    net([image], (32, 32))[:, 1, 1].sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.dim() == 5
    )
    net.eval()
    with torch.no_grad():
        alone, other = image.detach().clone(), image.detach().clone()
        other[:, :, 0] = 1 - other[:, :, 0]
        changed = (net([alone], (32, 32)) - net([other], (32, 32))).abs().amax((0, 1, 3, 4))
    assert (changed > 1e-6).all()  # the first slice is seen in the third one's logits


def test_without_a_sample_it_takes_part_in_the_backward_pass() -> None:
    net = ResUNet3d(1, 1, NARROW)
    logits = net([torch.zeros(0, 1, 2, 32, 32)], (32, 32))
    assert logits.shape == (0, 2, 2, 32, 32)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_it_is_trained_resumed_and_scored_and_learns(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(here, epochs=2, steps_per_epoch=6)
    assert (study.train_settings(UNIT).head_lr, study.train_settings(UNIT).weight_decay) == (
        0.002,
        0.0,
    )
    folder = train_unit(study, UNIT)
    undisturbed = (folder / "model.safetensors").read_bytes()
    card = json.loads((folder / "model.json").read_text())
    assert (card["head"], card["backbone"]["tile"], card["weights"]["source"]) == (
        "resunet3d",
        64,
        "none",
    )
    metrics = json.loads(evaluate_unit(study, UNIT).read_text())
    assert metrics["test"]["a"]["iou"] > 0.6  # bright discs on noise: chance is 0.2
    assert metrics["test"]["a"]["n"] == len(open_volume("a").split["test"])
    segmenter, _ = load_segmenter(folder)
    assert segmenter.regime.channels == NARROW
    assert open_model(folder).segmenter.regime.is_3d
    (here / "scratch/units").rename(here / "gone")
    stop_after_an_epoch(study, UNIT, monkeypatch)
    assert (train_unit(study, UNIT) / "model.safetensors").read_bytes() == undisturbed


def test_labelled_patches_and_a_start_from_another_dataset(here: Path) -> None:
    sets = {
        "a": ["a"],
        "b": ["b"],
        "b_2": {"datasets": ["b"], "crops": 2},
        "b_half": {"datasets": ["b"], "crops": "50%"},
    }
    tuned = {**KIND, "init_from": "deep-a"}
    study = a_study(
        here, regimes={"deep": KIND, "tuned": tuned}, train_sets=sets, epochs=1, steps_per_epoch=1
    )
    inputs = prepare(study, Unit("t", "tuned", "b_2", 0))
    source = build_segmenter(
        study.backbone_settings["t"], study.regime_settings["deep"], "resunet3d", 0
    )
    assert inputs.start
    assert not all(
        torch.equal(source.trained_state()[k], v)
        for k, v in inputs.segmenter.trained_state().items()
    )
    trained = load_segmenter(train_unit(study, UNIT))[0].trained_state()
    assert all(torch.equal(trained[k], v) for k, v in inputs.segmenter.trained_state().items())
    training = open_volume("b").split["train"]
    tiles = label(study, Unit("t", "deep", "b_2", 0), source)
    assert tiles.counts["crops"] == (
        2,
        len(training[::3]) * 3 * 4,
    )  # 3 x 4 patches of 32 x 32 cover 90 x 100 pixels
    assert len(set(tiles.tiles[0])) == 2
    assert all({z, z + 1, z + 2} <= set(training) for z, _, _ in tiles.tiles[0])
    assert (
        label(study, Unit("t", "deep", "b_half", 0), source).counts["crops"][0]
        == tiles.counts["crops"][1] // 2
    )
    images, labels = inputs.data[Draw(0, 1, 7)]
    assert (images.shape, labels.shape) == ((1, 3, 32, 32), (3, 32, 32))


def test_validation_looks_at_neighbours(here: Path) -> None:
    a_study(here)
    volume = open_volume("a")
    thick = dataclasses.replace(
        volume, manifest={**volume.manifest, "split": {"val": list(range(20, 40))}}
    )
    assert val_slices(thick, 4, depth=6) == list(range(27, 33))
    assert val_slices(thick, 8, depth=6) == list(range(26, 34))
    assert val_slices(thick, 4, depth=50) == val_slices(thick, 0, depth=6) == list(range(20, 40))
    assert val_slices(thick, 2) == [20, 39]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch": [3, 32, 48]}, "y = x, a multiple of 16"),
        ({"patch": [3, 40, 40]}, "y = x, a multiple of 16"),
        ({"patch": [0, 32, 32]}, "y = x, a multiple of 16"),
        ({"channels": [4, 4, 4, 0, 4]}, "expected numbers from 1 on"),
        ({"channels": [4, 4]}, "a list of 5"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        a_study(tmp_path, regimes={"deep": {**KIND, **change}})


def test_labelled_slices_are_refused_and_so_are_other_channels_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected `crops`, labelled patches"):
        a_study(tmp_path / "slices", train_sets={"a": {"datasets": ["a"], "slices": 2}})
    other = {**KIND, "init_from": "deep", "channels": [5] * 5}
    with pytest.raises(ConfigError, match="whose channels are"):
        a_study(tmp_path / "channels", regimes={"deep": KIND, "other": other})


def test_a_volume_thinner_than_the_patch_is_said_before_work(here: Path) -> None:
    study = a_study(here, regimes={"deep": {**KIND, "patch": [18, 32, 32]}})
    with pytest.raises(
        InputError,
        match="a volume thinner than the patch: at most 5 consecutive training slices; expected 18",
    ):
        train_unit(study, UNIT)
    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 2
    assert "volume thinner than the patch" in result.output


def test_no_tokens_are_computed_where_no_regime_has_a_backbone(here: Path) -> None:
    study = a_study(here)
    manifest = json.loads(tokens(study, "t", "a").read_text())
    assert (manifest["entries"], manifest["weights"]["source"]) == ([], "none")
    assert not Path("scratch/tokens").exists()
    assert study.tokens_of("deep") == ""


def test_defaults_are_those_of_the_study_that_it_is_from() -> None:
    spec = RegimeSettings("resunet3d")
    assert (spec.patch, spec.channels) == ((18, 160, 160), (28, 36, 48, 64, 80))
    assert np.prod(spec.patch) == 160 * 160 * 18
