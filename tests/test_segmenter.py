import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from emadapt.data.crops import Cached
from emadapt.errors import InputError
from emadapt.models.heads import HEADS
from emadapt.models.segmenter import Segmenter, build_segmenter, load_segmenter, save_segmenter
from emadapt.study.study import BackboneSettings, RegimeSettings

SPEC = BackboneSettings("tiny_dinov2", "random", blocks=(2, 4), tile=56, overlap=0.5)
REGIMES = {
    "frozen": RegimeSettings("frozen"),
    "lora": RegimeSettings("lora", rank=3, alpha=6.0, dropout=0.1),
    "lora_last_k": RegimeSettings("lora_last_k", rank=3, alpha=6.0, k=2),
    "dora": RegimeSettings("dora", rank=3, alpha=6.0),
    "bitfit": RegimeSettings("bitfit"),
    "full": RegimeSettings("full"),
}


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 1, 42, 56, generator=torch.Generator().manual_seed(seed))


def trained(regime: str, head: str, spec: BackboneSettings = SPEC) -> Segmenter:
    """A segmenter whose every trained tensor, buffers included, is away from its initial value."""
    segmenter = build_segmenter(spec, REGIMES[regime], head, seed=5)
    optimiser = torch.optim.SGD(
        [p for group in segmenter.trainable().values() for p in group], lr=0.5
    )
    segmenter.train()
    for seed in range(2):
        logits = segmenter(images(seed), (42, 56))
        (logits * torch.linspace(-1, 1, 56)).mean().backward()
        optimiser.step()
    return segmenter.eval()


@torch.inference_mode()
def logits(segmenter: Segmenter) -> torch.Tensor:
    return segmenter(images(9), (42, 56))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_and_loaded_gives_the_same_logits(
    tmp_path: Path, regime: str, head: str
) -> None:
    before = trained(regime, head)
    save_segmenter(before, tmp_path / "unit", {"threshold": 0.5})
    torch.manual_seed(12345)  # nothing of the loaded model is left to chance
    after, card = load_segmenter(tmp_path / "unit")
    assert not after.training
    assert torch.equal(logits(after), logits(before))
    assert not torch.equal(
        logits(after), logits(build_segmenter(SPEC, REGIMES[regime], head, seed=0).eval())
    )
    assert (after.spec, after.regime, after.head_name) == (SPEC, REGIMES[regime], head)
    assert card["threshold"] == 0.5
    assert card["weights"] == before.backbone.provenance.to_dict()


def test_on_disk_are_safetensors_and_json_without_the_backbone(tmp_path: Path) -> None:
    segmenter = trained("lora", "linear")
    save_segmenter(segmenter, tmp_path, {})
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "model.json"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(segmenter.trained_state())
    backbone = sum(p.numel() * 4 for p in segmenter.backbone.parameters())
    trained_bytes = sum(v.numel() * v.element_size() for v in segmenter.trained_state().values())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert trained_bytes <= size < trained_bytes + 10_000 < backbone / 5
    json.loads((tmp_path / "model.json").read_text())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_segmenter(trained("lora", "pyramid"), tmp_path / name, {"b": 1, "a": 2})
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_blocks_by_word_or_by_number_survive_the_card(tmp_path: Path) -> None:
    for blocks, numbers in (("last", (4,)), ("auto", (1, 2, 3, 4)), ((1, 3), (1, 3))):
        spec = dataclasses.replace(SPEC, blocks=blocks)
        save_segmenter(build_segmenter(spec, REGIMES["frozen"], "linear", 0), tmp_path, {})
        loaded, _ = load_segmenter(tmp_path)
        assert loaded.spec == spec
        assert loaded.backbone.blocks == numbers


def test_other_weights_than_those_it_was_trained_on_are_refused(tmp_path: Path) -> None:
    save_segmenter(trained("lora", "linear"), tmp_path, {})
    card = json.loads((tmp_path / "model.json").read_text())
    card["weights"]["sha256"] = "0" * 64
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(
        InputError,
        match=r"found backbone weights .*; expected 000000000000, which it was trained on",
    ):
        load_segmenter(tmp_path)


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_no_model_is_said_with_the_folder(tmp_path: Path, missing: str) -> None:
    save_segmenter(trained("frozen", "linear"), tmp_path / "unit", {})
    (tmp_path / "unit" / missing).unlink()
    with pytest.raises(
        InputError, match=r"unit: found no model; expected model.json and model.safetensors"
    ):
        load_segmenter(tmp_path / "unit")
    with pytest.raises(InputError, match="found no model"):
        load_segmenter(tmp_path / "nowhere")


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(InputError, match=r"head 'fpn'.*linear, deconv, pyramid, pyramid_bn, unet"):
        build_segmenter(SPEC, REGIMES["frozen"], "fpn", 0)


@pytest.mark.parametrize("regime", REGIMES)
def test_images_and_their_tokens_give_the_same_logits(regime: str) -> None:
    segmenter = trained(regime, "pyramid")
    with torch.inference_mode():
        tokens = segmenter.backbone(images(9))
        assert [tuple(t.shape) for t in tokens] == [(2, 64, 3, 4)] * 2
        assert torch.equal(segmenter(tokens, (42, 56)), logits(segmenter))
        assert torch.equal(segmenter(torch.cat(tokens, 1), (42, 56)), logits(segmenter))


@pytest.mark.parametrize("head", ["pyramid", "unet"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_adapters_in_the_last_blocks_see_what_the_whole_backbone_would_give_them(
    k: int, head: str
) -> None:
    """Logits and gradients from what is cached below the cut are those of a run from the image."""
    regime = RegimeSettings("lora_last_k", rank=3, alpha=6.0, k=k)
    segmenter = build_segmenter(SPEC, regime, head, seed=5).train()
    with torch.no_grad():
        for p in segmenter.trainable()["adapter"]:
            p.add_(0.1 * torch.randn(p.shape))
    assert segmenter.cut == 4 - k
    below, entering = segmenter.backbone.entering(images(), 4 - k)
    assert len(below) == (1 if k == 1 else 0)
    stacked = torch.cat(below, 1) if below else torch.zeros(2, 0, 3, 4)
    out = []
    for batch in (images(), Cached(stacked, entering, images())):
        found = segmenter(batch, (42, 56))
        (found * torch.linspace(-1, 1, 56)).sum().backward()
        gradients = [
            p.grad.clone()
            for group in segmenter.trainable().values()
            for p in group
            if p.grad is not None
        ]
        assert len(gradients) == len([p for group in segmenter.trainable().values() for p in group])
        out.append([found.detach(), *gradients])
        segmenter.zero_grad()
    for a, b in zip(*out, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_logits_of_overlapping_patches_lie_where_the_patches_do() -> None:
    """A head that repeats each token's first channel, on a backbone that averages each patch: bright stays where it is bright."""
    segmenter = build_segmenter(
        dataclasses.replace(SPEC, stride=7, blocks="last"), REGIMES["frozen"], "linear", 0
    )
    image = torch.zeros(1, 1, 56, 56)
    image[..., 20:36, 30:46] = 1.0
    means = F.avg_pool2d(image, 14, stride=7)
    assert means.shape[-2:] == segmenter.backbone.grid(image) == (7, 7)
    segmenter.head.forward = lambda tokens, size: F.interpolate(tokens[0], size, mode="bilinear")
    found = segmenter([means], (56, 56))[0, 0]
    assert found.shape == (56, 56)
    middle = [
        float((found.sum(1 - axis) * torch.arange(56)).sum() / found.sum()) for axis in (0, 1)
    ]
    assert middle == pytest.approx([27.5, 37.5], abs=1.0)
    edge = segmenter([torch.arange(7.0).expand(1, 1, 7, 7)], (56, 56))[
        0, 0, 0
    ]  # token i is centred on pixel 7 + 7 i
    assert float((edge[7::7] - torch.arange(7.0)).abs().max()) < 0.2


def test_a_head_that_needs_the_image_says_so() -> None:
    segmenter = build_segmenter(SPEC, REGIMES["frozen"], "unet", 0)
    with pytest.raises(ValueError, match="unet needs the image"):
        segmenter(segmenter.backbone(images()), (42, 56))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.json", b"{"),
        ("model.json", b'{"backbone": {"archh": 1}}'),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b""),
    ],
)
def test_a_damaged_model_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    save_segmenter(trained("frozen", "linear"), tmp_path / "unit", {})
    (tmp_path / "unit" / file).write_bytes(content)
    with pytest.raises(InputError, match=r"unit: found a damaged model.*Train the unit again"):
        load_segmenter(tmp_path / "unit")


def test_another_heads_tensors_are_refused(tmp_path: Path) -> None:
    save_segmenter(trained("frozen", "linear"), tmp_path / "unit", {})
    card = tmp_path / "unit/model.json"
    card.write_text(card.read_text().replace('"linear"', '"pyramid"'))
    with pytest.raises(InputError, match="head 'pyramid'"):
        load_segmenter(tmp_path / "unit")
