import re

import pytest
import torch
from torch import nn

from emadapt.errors import InputError
from emadapt.models.backbones import Backbone, build_backbone
from emadapt.models.regimes import (
    State,
    adapter_state,
    apply_regime,
    cut_of,
    load_adapter,
    merge,
    parameter_groups,
    unmerge,
)
from emadapt.models.segmenter import Segmenter
from emadapt.study.study import BackboneSettings, RegimeSettings, TrainSettings
from emadapt.training.fit import _optimiser

TINY = ["tiny_dinov2", "tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"]
DIM, DEPTH = 64, 4
KINDS = ["lora", "lora_last_k", "dora", "bitfit", "full"]
# Where families differ is where the adapters go; the rest is seen on the one whose code differs most.
CASES = [
    *((name, "lora") for name in TINY),
    *(("tiny_dinov3", kind) for kind in KINDS if kind != "lora"),
]


def regime(kind: str, **settings: object) -> RegimeSettings:
    k = {"k": 2} if kind == "lora_last_k" else {}
    return RegimeSettings(kind, **{"rank": 3, "alpha": 6.0, **k, **settings})  # type: ignore[arg-type]


def lora(rank: int = 3, **settings: float) -> RegimeSettings:
    return RegimeSettings("lora", rank=rank, alpha=6.0, **settings)  # type: ignore[arg-type]


def adapted(
    name: str = "tiny_dinov2",
    spec: RegimeSettings | None = None,
    blocks: tuple[int, ...] = (1, 2, 3, 4),
) -> Backbone:
    backbone = build_backbone(name, "random", blocks=blocks)
    apply_regime(backbone, spec or lora())
    return backbone


def randomise(backbone: Backbone, seed: int = 0) -> Backbone:
    """As after training: neither factor is zero, nothing else is what it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    noise if ".lora_A" in name or ".lora_B" in name else parameter + noise
                )
    return backbone


def images(backbone: Backbone) -> torch.Tensor:
    shape = (2, 1, 3 * backbone.arch.patch, 4 * backbone.arch.patch)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def tokens(backbone: Backbone) -> torch.Tensor:
    return torch.stack(backbone(images(backbone)))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_regime_is_the_identity_at_the_start(name: str, kind: str) -> None:
    backbone = adapted(name, regime(kind))
    assert torch.equal(tokens(backbone), tokens(build_backbone(name, "random")))
    backbone.train()
    assert torch.equal(tokens(backbone), tokens(build_backbone(name, "random")))


def expected_names(backbone: Backbone, kind: str, last: int) -> set[str]:
    """What each kind should train, from the names in a plain backbone and what its paper says; blocks above `last` do not run."""
    plain = {n for n, _ in build_backbone(backbone.arch_name, "random").named_parameters()}
    plain = {n for n in plain if not (m := re.match(r"vit\.blocks\.(\d+)", n)) or int(m[1]) < last}
    if kind == "full":
        return plain
    if kind == "bitfit":
        return {n for n in plain if n.endswith("bias") or re.search(r"norm\d?(_pre)?\.weight$", n)}
    parts = ["lora_A.default.weight", "lora_B.default.weight"]
    parts += ["lora_magnitude_vector.default.weight"] if kind == "dora" else []
    first = last - 2 if kind == "lora_last_k" else 0
    return {
        f"vit.blocks.{i}.attn.{t}.{p}"
        for i in range(first, last)
        for t in ("qkv", "proj")
        for p in parts
    }


@pytest.mark.parametrize(
    ("name", "kind", "last"),
    [
        *((*case, DEPTH) for case in CASES),
        *((n, "full", DEPTH) for n in TINY[:2]),
        *((n, "bitfit", 3) for n in TINY[1:]),
        *(("tiny_dinov2", kind, 3) for kind in KINDS),
    ],
)
def test_a_gradient_reaches_exactly_what_the_regime_trains(name: str, kind: str, last: int) -> None:
    backbone = randomise(adapted(name, regime(kind), blocks=(1, last)))
    found = torch.cat(backbone(images(backbone)), 1)
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    reached = {
        n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    # The class token and registers of a ViT that starts at random matter little, but not nothing.
    assert reached == expected_names(backbone, kind, last)
    assert reached == {n for n, p in backbone.named_parameters() if p.requires_grad}
    plain = {
        n.removeprefix("vit.").replace(".default", "").removesuffix(".weight") for n in reached
    }
    assert {
        n.removesuffix(".weight") for n in adapter_state(backbone)
    } == plain  # and that is what is saved


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_regime_trains_differs_after_a_step(kind: str) -> None:
    backbone = adapted(spec=regime(kind))
    before = {n: p.clone() for n, p in backbone.state_dict().items()}
    optimiser = torch.optim.AdamW(parameter_groups(backbone, regime(kind), 0.1, 0.1))
    for _ in range(2):  # A has no gradient while B is zero
        torch.cat(backbone(images(backbone)), 1).square().sum().backward()
        optimiser.step()
    changed = {n for n, p in backbone.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == expected_names(backbone, kind, DEPTH)


@pytest.mark.parametrize("name", TINY)
def test_lora_trains_two_thin_factors_for_qkv_and_proj_of_every_block(name: str) -> None:
    rank = 5
    backbone = adapted(name, lora(rank))
    trained = {n: tuple(p.shape) for n, p in backbone.named_parameters() if p.requires_grad}
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    modules = {n.split(".lora_")[0] for n in trained}
    assert modules == {
        f"vit.blocks.{i}.attn.{part}" for i in range(DEPTH) for part in ("qkv", "proj")
    }
    assert len(trained) == 2 * 2 * DEPTH
    # A: rank x D twice; B: 3D x rank for qkv, D x rank for proj.
    assert sum(a * b for a, b in trained.values()) == DEPTH * rank * (2 * DIM + 3 * DIM + DIM)


@pytest.mark.parametrize("name", TINY)
def test_after_training_every_adapter_changes_the_tokens(name: str) -> None:
    frozen = tokens(build_backbone(name, "random"))
    backbone = randomise(adapted(name))
    assert distance(tokens(backbone), frozen) > 0.01
    full = tokens(backbone)
    for layer in {n.split(".lora_")[0] for n in adapter_state(backbone)}:
        state = adapter_state(backbone)
        without = {
            k: torch.zeros_like(v) if k.startswith(f"{layer}.") else v.clone()
            for k, v in state.items()
        }
        backup = {k: v.clone() for k, v in state.items()}
        load_adapter(backbone, without)
        assert distance(tokens(backbone), full) > 1e-5, layer
        load_adapter(backbone, backup)


def test_lora_adds_alpha_over_rank_times_b_a() -> None:
    backbone = randomise(adapted(spec=lora(rank=4)))  # alpha 6
    layer = backbone.vit.blocks[1].attn.qkv
    x = torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + 6 / 4 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("name", "kind"), [case for case in CASES if case[1] in ("lora", "lora_last_k", "dora")]
)
def test_merging_keeps_the_tokens_and_can_be_undone(name: str, kind: str) -> None:
    backbone = randomise(adapted(name, regime(kind, dropout=0.3))).eval()
    before, state = tokens(backbone), {k: v.clone() for k, v in adapter_state(backbone).items()}
    weights = {n: p.clone() for n, p in backbone.named_parameters()}
    merge(backbone)
    assert not torch.equal(
        backbone.vit.blocks[3].attn.qkv.base_layer.weight,
        weights["vit.blocks.3.attn.qkv.base_layer.weight"],
    )
    assert distance(tokens(backbone), before) < 1e-5
    assert all(
        torch.equal(v, state[k]) for k, v in adapter_state(backbone).items()
    )  # a merged model can still be saved
    unmerge(backbone)
    for name_, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter, weights[name_], rtol=1e-5, atol=1e-6)
    assert distance(tokens(backbone), before) < 1e-5


@pytest.mark.parametrize("kind", ["bitfit", "full"])
def test_without_adapters_merging_changes_nothing(kind: str) -> None:
    backbone = randomise(adapted(spec=regime(kind)))
    before = tokens(backbone)
    merge(backbone)
    assert torch.equal(tokens(backbone), before)
    unmerge(backbone)
    assert torch.equal(tokens(backbone), before)


def test_dora_scales_each_row_of_the_adapted_weight_to_its_magnitude() -> None:
    """W' = m (W + s B A) / ||W + s B A|| by row, eq. 5 of the paper."""
    backbone = randomise(adapted(spec=regime("dora", rank=4)))  # alpha 6
    layer = backbone.vit.blocks[1].attn.qkv
    x = torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    direction = layer.base_layer.weight + 6 / 4 * (b @ a)
    weight = (
        layer.lora_magnitude_vector["default"].weight[:, None]
        * direction
        / direction.norm(dim=1, keepdim=True)
    )
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base_layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_adapter_goes_from_one_backbone_to_another(name: str, kind: str) -> None:
    source, target = randomise(adapted(name, regime(kind))), adapted(name, regime(kind))
    state = {k: v.clone() for k, v in adapter_state(source).items()}
    assert distance(tokens(target), tokens(source)) > 0.01
    load_adapter(target, state)
    assert torch.equal(tokens(target), tokens(source))
    assert adapter_state(target).keys() == state.keys()


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    state = adapter_state(adapted(spec=lora(rank=3)))
    short = dict(list(state.items())[1:])
    for backbone, wrong in (
        (adapted(spec=lora(rank=2)), state),
        (adapted(), short),
        (adapted(), {**state, "blocks.9.attn.qkv.lora_A.weight": torch.zeros(3, DIM)}),
        (adapted(), {}),
        (build_backbone("tiny_dinov2", "random"), state),  # frozen
        (adapted(spec=regime("bitfit")), state),
        (adapted(spec=regime("lora_last_k", rank=3)), state),
        (adapted(spec=regime("full")), dict(adapter_state(adapted(spec=regime("bitfit"))))),
    ):
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        with pytest.raises(
            InputError, match=r"adapter: found .* tensors that do not fit, e.g. blocks"
        ):
            load_adapter(backbone, wrong)
        assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"rank 65: found a rank above the width 64 of tiny_dinov2.*Lower `rank`"
    ):
        adapted(spec=lora(rank=DIM + 1))
    adapted(spec=lora(rank=DIM))


def test_more_blocks_than_there_are_cannot_be_the_last_ones() -> None:
    assert [cut_of(adapted(blocks=(1, 3)), regime("lora_last_k", k=k)) for k in (1, 2, 3)] == [
        2,
        1,
        0,
    ]
    assert cut_of(adapted(), lora()) is None
    with pytest.raises(
        InputError,
        match=r"k = 4: found more than the 3 blocks of tiny_dinov2 that run; expected k of 1 to 3",
    ):
        adapted(spec=regime("lora_last_k", k=4), blocks=(1, 3))


@pytest.mark.parametrize("name", TINY)
def test_the_learning_rate_of_full_falls_block_by_block_and_vectors_do_not_decay(name: str) -> None:
    backbone = adapted(name, regime("full", layer_decay=0.5))
    given = {
        id(p): (g["lr"], g["weight_decay"])
        for g in parameter_groups(backbone, regime("full", layer_decay=0.5), 0.8, 0.3)
        for p in g["params"]
    }
    for parameter_name, p in backbone.vit.named_parameters():
        block = re.match(r"blocks\.(\d+)", parameter_name)
        below = (
            0
            if parameter_name.startswith("norm.")
            else DEPTH - 1 - int(block[1])
            if block
            else DEPTH
        )
        expected = 0.0 if p.ndim == 1 or parameter_name in ("cls_token", "pos_embed") else 0.3
        assert given[id(p)][0] == pytest.approx(0.8 * 0.5**below), parameter_name
        assert parameter_name == "reg_token" or given[id(p)][1] == expected, parameter_name
    flat = [
        g
        for kind in ("bitfit", "dora", "lora")
        for g in parameter_groups(adapted(name, regime(kind)), regime(kind), 0.8, 0.3)
    ]
    assert {g["lr"] for g in flat} == {0.8}
    assert all(
        g["weight_decay"] == (0.0 if p.ndim == 1 else 0.3) for g in flat for p in g["params"]
    )


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_computes_blocks_again_and_changes_no_gradient(name: str) -> None:
    gradients, runs = [], []
    for checkpointing in (False, True):
        backbone = adapted(name, regime("full", checkpointing=checkpointing)).train()
        calls: list[int] = []
        for block in backbone.vit.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.stack(backbone(images(backbone))).square().sum().backward()
        runs.append(len(calls))
        gradients.append({n: p.grad for n, p in backbone.named_parameters()})
    assert runs == [DEPTH, 2 * DEPTH]
    for key, value in gradients[0].items():
        assert value is not None
        torch.testing.assert_close(gradients[1][key], value)


def test_frozen_leaves_nothing_to_train_or_save() -> None:
    backbone = build_backbone("tiny_dinov2", "random")
    before = tokens(backbone)
    backbone.requires_grad_(True)
    apply_regime(backbone, RegimeSettings("frozen"))
    assert not [p for p in backbone.parameters() if p.requires_grad]
    assert adapter_state(backbone) == {}
    load_adapter(backbone, {})
    merge(backbone)
    assert torch.equal(tokens(backbone), before)


def test_dropout_acts_in_training_only() -> None:
    backbone = randomise(adapted(spec=lora(dropout=0.5)))
    same = randomise(adapted(spec=lora(dropout=0.0)))
    assert torch.equal(tokens(backbone.eval()), tokens(same.eval()))
    backbone.train()
    assert distance(tokens(backbone), tokens(backbone)) > 1e-4


@pytest.mark.parametrize("kind", ["frozen", *KINDS[:3]])
def test_a_trained_state_is_head_and_adapter_and_none_of_the_backbone(kind: str) -> None:
    spec = BackboneSettings("tiny_dinov2", "random", tile=56)
    backbone = build_backbone(spec.arch, spec.source)
    pretrained = {v.data_ptr() for v in backbone.state_dict().values()}
    segmenter = Segmenter(spec, regime(kind), "linear", 0, backbone)
    state: State = segmenter.trained_state()
    assert not [k for k, v in state.items() if v.data_ptr() in pretrained]
    n = {
        part: sum(v.numel() for k, v in state.items() if k.startswith(f"{part}."))
        for part in ("head", "adapter")
    }
    per_block = 3 * 6 * DIM
    assert (
        n["adapter"]
        == {
            "frozen": 0,
            "lora": DEPTH * per_block,
            "lora_last_k": 2 * per_block,
            "dora": DEPTH * (per_block + 4 * DIM),
        }[kind]
    )
    assert segmenter.share() == n["adapter"] / sum(
        p.numel() for p in build_backbone(spec.arch, spec.source).parameters()
    )
    width = 4 * DIM
    assert (
        n["head"] == 2 * width + 2 + 2 * width + 1
    )  # weights, bias, running mean and variance, number of batches
    assert sum(v.numel() for v in state.values()) == sum(n.values())
    assert segmenter.n_trainable() == n["adapter"] + 2 * width + 2


def test_the_seed_alone_decides_the_initial_adapter_and_head() -> None:
    def state(seed: int) -> State:
        torch.manual_seed(99 - seed)  # what ran before does not matter
        spec = BackboneSettings("tiny_dinov2", "random", tile=56)
        return Segmenter(
            spec, lora(), "pyramid", seed, build_backbone(spec.arch, spec.source)
        ).trained_state()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    drawn = [k for k, v in first.items() if v.ndim > 1 and ".lora_B" not in k]
    assert drawn
    assert not [k for k in drawn if torch.equal(first[k], other[k])]
    for key, value in first.items():
        if (
            ".lora_A" in key
        ):  # Kaiming-uniform with peft's a = sqrt(5): the bound is 1 / sqrt(fan in)
            assert 0.5 / DIM**0.5 < float(value.abs().max()) <= 1 / DIM**0.5
        assert ".lora_B" not in key or not value.any()


@pytest.mark.parametrize("kind", ["frozen", *KINDS])
def test_the_optimiser_gets_every_parameter_that_is_trained_once(kind: str) -> None:
    spec = BackboneSettings("tiny_dinov2", "random", tile=56)
    segmenter = Segmenter(spec, regime(kind), "pyramid", 0, build_backbone(spec.arch, spec.source))
    given = [
        id(p)
        for group in _optimiser(segmenter, TrainSettings()).param_groups
        for p in group["params"]
    ]
    assert set(given) == {id(p) for group in segmenter.trainable().values() for p in group}
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for p in nn.Module.parameters(segmenter) if p.requires_grad}
