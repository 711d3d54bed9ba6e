"""Adapters on every family of backbones: the identity at the start, and nothing trained but what
they say."""

import re
from collections.abc import Callable

import pytest
import torch

from emadapt.errors import InputError
from emadapt.models import adapters
from emadapt.models.adapters import add_lora, cut_below, train_all, train_biases
from emadapt.models.backbones import Backbone
from tiny import build_backbone

TINY = ["tiny_dinov2", "tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"]
DIM, DEPTH = 64, 4
ADAPT: dict[str, Callable[[Backbone], None]] = {
    "lora": lambda backbone: add_lora(backbone, 3, 6.0, 0.0),
    "lora_last_2": lambda backbone: add_lora(backbone, 3, 6.0, 0.0, cut_below(backbone, 2)),
    "bitfit": train_biases,
    "full": train_all,
}
CASES = [
    *((name, "lora") for name in TINY),
    *(("tiny_dinov3", kind) for kind in ADAPT if kind != "lora"),
    ("tiny_openclip", "bitfit"),
]


def adapted(name: str = "tiny_dinov2", kind: str = "lora", last: int = DEPTH) -> Backbone:
    backbone = build_backbone(name, "random", blocks=(1, last))
    ADAPT[kind](backbone)
    return backbone


def randomise(backbone: Backbone) -> Backbone:
    """As after training: nothing that is trained is what it was."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in backbone.vit.named_parameters():
            if p.requires_grad:
                noise = 0.1 * torch.randn(p.shape, generator=generator)
                p.copy_(noise if ".lora_" in name else p + noise)
    return backbone


def images(backbone: Backbone) -> torch.Tensor:
    shape = (2, 1, 3 * backbone.arch.patch, 4 * backbone.arch.patch)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def tokens(backbone: Backbone) -> torch.Tensor:
    return torch.stack(backbone(images(backbone)))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_adapter_is_the_identity_at_the_start(name: str, kind: str) -> None:
    plain = build_backbone(name, "random", blocks=(1, DEPTH))
    assert torch.equal(tokens(adapted(name, kind).train()), tokens(plain))


def expected_names(backbone: Backbone, kind: str, last: int) -> set[str]:
    """What each kind should train, from the names in a plain ViT; blocks above `last` do not
    run."""
    plain = {n for n, _ in build_backbone(backbone.arch_name, "random").vit.named_parameters()}
    plain = {n for n in plain if not (m := re.match(r"blocks\.(\d+)", n)) or int(m[1]) < last}
    if kind == "full":
        return plain
    if kind == "bitfit":
        return {n for n in plain if n.endswith("bias") or re.search(r"norm\d?(_pre)?\.weight$", n)}
    blocks = range(last - 2 if kind == "lora_last_2" else 0, last)
    layers = {f"blocks.{i}.attn.{part}" for i in blocks for part in ("qkv", "proj")}
    return {f"{layer}.lora_{factor}.default.weight" for layer in layers for factor in "AB"}


@pytest.mark.parametrize(
    ("name", "kind", "last"),
    [*((*case, DEPTH) for case in CASES), *(("tiny_dinov2", kind, 3) for kind in ADAPT)],
)
def test_a_gradient_reaches_exactly_what_is_trained_and_saved(
    name: str, kind: str, last: int
) -> None:
    backbone = randomise(adapted(name, kind, last))
    found = torch.cat(backbone(images(backbone)), 1)
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    named = dict(backbone.vit.named_parameters())
    reached = {n for n, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == expected_names(backbone, kind, last)
    assert reached == {n for n, p in named.items() if p.requires_grad}
    saved = {n.replace(".default", "") for n in reached}
    assert set(adapters.adapter_state(backbone.vit)) == saved


@pytest.mark.parametrize("name", TINY)
def test_merging_keeps_the_tokens_and_can_be_undone(name: str) -> None:
    backbone = randomise(adapted(name)).eval()
    before = tokens(backbone)
    weight = backbone.vit.blocks[3].attn.qkv.base_layer.weight
    plain = weight.clone()
    adapters.merge(backbone)
    assert not torch.equal(weight, plain)
    torch.testing.assert_close(tokens(backbone), before, rtol=1e-4, atol=1e-4)
    adapters.unmerge(backbone)
    torch.testing.assert_close(weight, plain, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    state = adapters.adapter_state(adapted().vit)
    wider = build_backbone("tiny_dinov2", "random")
    add_lora(wider, rank=4, alpha=6.0, dropout=0.0)
    short = dict(list(state.items())[1:])
    plain = build_backbone("tiny_dinov2", "random")
    for backbone, wrong in ((wider, state), (adapted(), short), (adapted(), {}), (plain, state)):
        with pytest.raises(InputError, match=r"adapter: found .* tensors that do not fit"):
            adapters.load_adapter(backbone.vit, wrong)


@pytest.mark.parametrize("kind", ADAPT)
def test_matrices_decay_and_vectors_do_not(kind: str) -> None:
    vit = adapted(kind=kind).vit
    groups = adapters.vectors_apart(vit, 0.8, 0.3)
    given = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = {n: p for n, p in vit.named_parameters() if p.requires_grad}
    assert set(given) == {id(p) for p in trained.values()}
    for name, p in trained.items():
        free = p.ndim == 1 or name in ("cls_token", "pos_embed")
        assert given[id(p)] == (0.0 if free else 0.3), name
    assert {group["lr"] for group in groups} == {0.8}


def test_weights_are_read_when_a_token_is_wanted() -> None:
    backbone = build_backbone("tiny_dinov2", "random")
    state = torch.get_rng_state()
    assert backbone.network is None
    assert not list(backbone.parameters())
    tokens(backbone)
    assert backbone.network is not None
    assert not [p for p in backbone.parameters() if p.requires_grad]
    assert torch.equal(torch.get_rng_state(), state)
