"""Tokens equal those of timm, Hugging Face and open_clip, each given the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from emadapt.models import backbones
from emadapt.models.archs import BACKBONES, Arch, create_vit, get_arch
from emadapt.models.backbones import LORA_TARGETS
from tiny import build_backbone

TINY = [name for name in BACKBONES if name.startswith("tiny_")]
REAL = [name for name in BACKBONES if not name.startswith("tiny_")]
OPENCLIP = {
    "openclip_b16": ("ViT-B-16", "laion2b_s34b_b88k"),
    "openclip_l14": ("ViT-L-14", "laion2b_s32b_b82k"),
}
NATIVE = 112  # pretraining size of the tiny architectures with a position embedding: 8 x 8 patches


def _images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def _randomise(model: torch.nn.Module) -> Any:
    """Every parameter away from its usual zero or one, so that a swapped or dropped tensor
    shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _normalised(images: torch.Tensor, arch: Arch) -> torch.Tensor:
    mean, std = torch.tensor(arch.mean).view(1, 3, 1, 1), torch.tensor(arch.std).view(1, 3, 1, 1)
    return (images.repeat(1, 3, 1, 1) - mean) / std


def _maps(tokens: torch.Tensor, prefix: int, height: int, width: int) -> torch.Tensor:
    return tokens[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- registry


@pytest.mark.parametrize("name", REAL)
def test_registry_agrees_with_timm_and_open_clip(name: str) -> None:
    arch = BACKBONES[name]
    with torch.device("meta"):
        vit = create_vit(arch)
    assert (vit.embed_dim, len(vit.blocks)) == (arch.dim, arch.depth)
    assert tuple(vit.patch_embed.patch_size) == (arch.patch, arch.patch)
    if arch.family == "openclip":
        open_clip = pytest.importorskip("open_clip")
        model, tag = OPENCLIP[name]
        registered = open_clip.get_pretrained_cfg(model, tag)
        config = open_clip.get_model_config(model)
        assert registered["hf_hub"].rstrip("/") == arch.hub
        assert (tuple(registered["mean"]), tuple(registered["std"])) == (arch.mean, arch.std)
        # Exact GELU, as create_vit builds it: neither the tag nor the model asks for QuickGELU.
        assert not registered.get("quick_gelu")
        assert not config.get("quick_gelu")
        assert type(vit.blocks[0].mlp.act) is torch.nn.GELU
        found = [config["vision_cfg"][name] for name in ("width", "layers", "patch_size")]
        assert found == [arch.dim, arch.depth, arch.patch]
    else:
        registered = timm.get_pretrained_cfg(arch.hub.removeprefix("timm/"))
        assert registered is not None
        own = (registered.hf_hub_id, registered.mean, registered.std)
        assert own == (arch.hub, arch.mean, arch.std)


@pytest.mark.parametrize(
    ("name", "adapter"), [("dinov2_s", 442_368), ("dinov3_s", 442_368), ("openclip_l14", 2_359_296)]
)
def test_lora_targets_give_the_references_parameter_count(name: str, adapter: int) -> None:
    with torch.device("meta"):
        named = create_vit(get_arch(name)).named_modules()
    targets = [m for n, m in named if n.endswith(tuple(f".{suffix}" for suffix in LORA_TARGETS))]
    assert sum(16 * (m.in_features + m.out_features) for m in targets) == adapter


# ---------------------------------------------------------------- against other implementations


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("grid", [(8, 8), (5, 11)])
def test_tokens_equal_timms_forward(name: str, grid: tuple[int, int]) -> None:
    backbone = build_backbone(name, "random")
    arch = backbone.arch
    images = _images(2, 1, grid[0] * arch.patch, grid[1] * arch.patch)
    with torch.inference_mode():
        maps = backbone(images)
        x = _normalised(images, arch)
        last = backbone.vit.forward_features(x)
        every: Any = timm.create_model(
            arch.timm_name,
            features_only=True,
            out_indices=[0, 1, 2, 3],
            dynamic_img_size=True,
            **arch.kwargs,
        )
        every.model.load_state_dict(backbone.vit.state_dict(), strict=False)
        unnormalised = every.eval()(x)
    assert [tuple(m.shape) for m in maps] == [(2, 64, *grid)] * 4
    torch.testing.assert_close(maps[-1], _maps(last, backbone.vit.num_prefix_tokens, *grid))
    for ours, theirs in zip(maps, unnormalised, strict=True):
        normed = backbone.vit.norm(theirs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, normed)


def _dinov2_of_hugging_face(registers: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=NATIVE,
        patch_size=14,
        layerscale_value=1.0,
    )
    return _randomise(getattr(transformers, f"{kind}Model")(config))


def _dinov3_of_hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_register_tokens=4,
        patch_size=16,
        layerscale_value=1.0,
    )
    model = _randomise(transformers.DINOv3ViTModel(config))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "v_proj.bias")):
            parameter.data.zero_()  # as in the published models
    return model


def _compare_with_hugging_face(
    name: str, model: Any, folder: Path, size: tuple[int, int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens of each block from here and there, after the file has gone the way of a user's
    file."""
    model.save_pretrained(folder)  # in the naming of the published checkpoints
    backbone = build_backbone(name, "file", file=folder / "model.safetensors")
    images = _images(2, 1, *size)
    grid = [side // backbone.arch.patch for side in size]
    with torch.inference_mode():
        out = model(_normalised(images, backbone.arch), output_hidden_states=True)
        norm = model.norm if hasattr(model, "norm") else model.layernorm
        theirs = [
            _maps(norm(hidden), backbone.vit.num_prefix_tokens, *grid)
            for hidden in out.hidden_states[1:]
        ]
        torch.testing.assert_close(
            theirs[-1], _maps(out.last_hidden_state, backbone.vit.num_prefix_tokens, *grid)
        )
        return list(zip(backbone(images), theirs, strict=True))


@pytest.mark.parametrize(
    ("registers", "size"),
    [(False, (112, 112)), (True, (112, 112)), (True, (140, 182)), (True, (56, 98))],
)
def test_dinov2_equals_hugging_face(registers: bool, size: tuple[int, int], tmp_path: Path) -> None:
    name = "tiny_dinov2_reg" if registers else "tiny_dinov2"
    for ours, theirs in _compare_with_hugging_face(
        name, _dinov2_of_hugging_face(registers), tmp_path, size
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(112, 112), (80, 144), (256, 256)])
def test_dinov3_equals_hugging_face(size: tuple[int, int], tmp_path: Path) -> None:
    for ours, theirs in _compare_with_hugging_face(
        "tiny_dinov3", _dinov3_of_hugging_face(), tmp_path, size
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_openclip_equals_open_clip(tmp_path: Path) -> None:
    from open_clip.model import CLIP

    vision = {"layers": 4, "width": 64, "head_width": 32, "patch_size": 14, "image_size": NATIVE}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    clip = _randomise(CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text))
    # Text tower too.
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors"
    )
    backbone = build_backbone("tiny_openclip", "file", file=tmp_path / "clip.safetensors")
    images = _images(2, 1, NATIVE, NATIVE)
    with torch.inference_mode():
        theirs = clip.visual.forward_intermediates(
            _normalised(images, backbone.arch),
            normalize_intermediates=True,
            intermediates_only=True,
        )["image_intermediates"]
        ours = backbone(images)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- in two parts, as `lora_last_k`
# runs it


@pytest.mark.parametrize("name", TINY)
def test_what_enters_a_block_and_the_rest_from_there_are_timms_forward(name: str) -> None:
    backbone = build_backbone(name, "random", blocks=(2, 4))
    _randomise(backbone.vit)
    images = _images(2, 1, 3 * backbone.arch.patch, 5 * backbone.arch.patch)
    entered: dict[int, torch.Tensor] = {}
    for number, block in enumerate(backbone.vit.blocks):
        block.register_forward_pre_hook(
            lambda _, given, number=number: entered.setdefault(number, given[0].detach())
        )
    whole = backbone.vit.forward_intermediates(
        _normalised(images, backbone.arch), indices=[1, 3], norm=True, intermediates_only=True
    )
    at = dict(entered)
    for cut in range(4):
        below, x = backbone.entering(images, cut)
        torch.testing.assert_close(x, at[cut])
        assert x.shape == (2, backbone.vit.num_prefix_tokens + 15, 64)
        assert not x.requires_grad
        assert len(below) == (cut > 2)  # block 2 itself, at cut 2, is what enters block 3
        rest = backbone.resume(below, x, cut, (3, 5))
        assert len(rest) == 2
        for ours, theirs in zip(rest, whole, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_keeps_less_for_the_same_gradients(name: str) -> None:
    """Of the blocks above a cut, too, which are run on cached tokens."""
    backbone = build_backbone(name, "random")
    backbone.vit.requires_grad_(True)
    images = _images(1, 1, 4 * backbone.arch.patch, 4 * backbone.arch.patch)
    below, entering = backbone.entering(images, 2)
    kept, gradients = [], []
    saved: list[int] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        saved.append(value.numel())
        return value

    for checkpointing in (False, True):
        backbone.vit.set_grad_checkpointing(checkpointing)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            tokens = backbone.resume(below, entering, 2, (4, 4))
        backbone.zero_grad()
        torch.cat(tokens).square().sum().backward()
        kept.append(sum(saved))
        gradients.append([p.grad for p in backbone.vit.blocks[3].parameters()])
    assert kept[1] < kept[0] / 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", TINY)
def test_autocast_and_fused_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused in fp32 and for many tokens, plain products for few in bf16: the same tokens but for
    rounding."""
    backbone = build_backbone(name, "random")
    images = _images(1, 1, 4 * backbone.arch.patch, 4 * backbone.arch.patch)

    def fused() -> set[bool]:
        return {block.attn.fused_attn for block in backbone.vit.blocks}

    exact = backbone(images)
    assert fused() == {True}
    with torch.autocast("cpu", torch.bfloat16):
        plain = backbone(images)
        assert fused() == {False}
        below, entering = backbone.entering(images, 2)
        resumed = backbone.resume(below, entering, 2, (4, 4))
        assert all(torch.equal(a, b) for a, b in zip(plain, resumed, strict=True))
        monkeypatch.setattr(backbones, "PLAIN_TOKENS", 15)
        many = backbone(images)
        assert fused() == {True}
    for a, b, c in zip(exact, plain, many, strict=True):
        assert (a - b.float()).norm() < 0.05 * a.norm()
        assert (c - b.float()).norm() < 0.05 * a.norm()
    # As before, not as bf16 left it.
    assert all(torch.equal(a, b) for a, b in zip(exact, backbone(images), strict=True))


def test_normalisation() -> None:
    own = build_backbone("tiny_openclip", "random")
    study = build_backbone("tiny_openclip", "random", normalisation="imagenet")
    images = _images(1, 1, 56, 56)
    arch = BACKBONES["tiny_dinov2"]  # ImageNet's statistics
    expected = own.vit.forward_intermediates(
        _normalised(images, arch), norm=True, intermediates_only=True
    )
    for ours, theirs in zip(study(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (study(images)[-1] - own(images)[-1]).abs().max() > 0.01
    # For DINOv2 the two are the same.
    same = [
        build_backbone("tiny_dinov2", "random", normalisation=n)(images)[-1]
        for n in ("checkpoint", "imagenet")
    ]
    assert torch.equal(*same)
