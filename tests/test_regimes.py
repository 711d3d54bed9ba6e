import pytest
import torch
from torch import nn

from emadapt.config import BackboneSpec, RegimeSpec
from emadapt.errors import InputError
from emadapt.models.backbones import Backbone, build_backbone
from emadapt.models.regimes import State, adapter_state, apply_regime, load_adapter, merge, unmerge
from emadapt.models.segmenter import Segmenter

TINY = ["tiny_dinov2", "tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"]
DIM, DEPTH = 64, 4


def lora(rank: int = 3, **settings: float) -> RegimeSpec:
    return RegimeSpec("lora", rank=rank, alpha=6.0, **settings)  # type: ignore[arg-type]


def adapted(name: str = "tiny_dinov2", spec: RegimeSpec | None = None) -> Backbone:
    backbone = build_backbone(name, "random")
    apply_regime(backbone, spec or lora())
    return backbone


def randomise(backbone: Backbone, seed: int = 0) -> Backbone:
    """Adapters as after training: neither factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


def images(backbone: Backbone) -> torch.Tensor:
    shape = (2, 1, 3 * backbone.arch.patch, 4 * backbone.arch.patch)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def tokens(backbone: Backbone) -> torch.Tensor:
    return torch.stack(backbone(images(backbone)))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", TINY)
def test_lora_is_the_identity_at_the_start(name: str) -> None:
    assert torch.equal(tokens(adapted(name)), tokens(build_backbone(name, "random")))


@pytest.mark.parametrize("name", TINY)
def test_lora_trains_two_thin_factors_for_qkv_and_proj_of_every_block(name: str) -> None:
    rank = 5
    backbone = adapted(name, lora(rank))
    trained = {n: tuple(p.shape) for n, p in backbone.named_parameters() if p.requires_grad}
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    modules = {n.split(".lora_")[0] for n in trained}
    assert modules == {f"vit.blocks.{i}.attn.{part}" for i in range(DEPTH) for part in ("qkv", "proj")}
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
        without = {k: torch.zeros_like(v) if k.startswith(f"{layer}.") else v.clone() for k, v in state.items()}
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


@pytest.mark.parametrize("name", TINY)
def test_merging_keeps_the_tokens_and_can_be_undone(name: str) -> None:
    backbone = randomise(adapted(name))
    before, state = tokens(backbone), {k: v.clone() for k, v in adapter_state(backbone).items()}
    weights = {n: p.clone() for n, p in backbone.named_parameters()}
    merge(backbone)
    assert not torch.equal(backbone.vit.blocks[0].attn.qkv.base_layer.weight, weights["vit.blocks.0.attn.qkv.base_layer.weight"])
    assert distance(tokens(backbone), before) < 1e-5
    assert all(torch.equal(v, state[k]) for k, v in adapter_state(backbone).items())  # a merged model can still be saved
    unmerge(backbone)
    for name_, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter, weights[name_], rtol=1e-5, atol=1e-6)
    assert distance(tokens(backbone), before) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_the_adapter_goes_from_one_backbone_to_another(name: str) -> None:
    source, target = randomise(adapted(name)), adapted(name)
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
    ):
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        with pytest.raises(InputError, match=r"adapter: found .* tensors that do not fit, e.g. blocks"):
            load_adapter(backbone, wrong)
        assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"rank 65: found a rank above the width 64 of tiny_dinov2.*Lower `rank`"):
        adapted(spec=lora(rank=DIM + 1))
    adapted(spec=lora(rank=DIM))


def test_frozen_leaves_nothing_to_train_or_save() -> None:
    backbone = build_backbone("tiny_dinov2", "random")
    before = tokens(backbone)
    backbone.requires_grad_(True)
    apply_regime(backbone, RegimeSpec("frozen"))
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


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_a_trained_state_is_head_and_adapter_and_none_of_the_backbone(kind: str) -> None:
    spec = BackboneSpec("tiny_dinov2", "random", tile=56)
    backbone = build_backbone(spec.arch, spec.source)
    pretrained = {v.data_ptr() for v in backbone.state_dict().values()}
    regime = lora(rank=3) if kind == "lora" else RegimeSpec("frozen")
    segmenter = Segmenter(spec, regime, "linear", 0, backbone)
    state: State = segmenter.trained_state()
    assert not [k for k, v in state.items() if v.data_ptr() in pretrained]
    n = {part: sum(v.numel() for k, v in state.items() if k.startswith(f"{part}.")) for part in ("head", "adapter")}
    assert n["adapter"] == (DEPTH * 3 * 6 * DIM if kind == "lora" else 0)
    width = 4 * DIM
    assert n["head"] == 2 * width + 2 + 2 * width + 1  # weights, bias, running mean and variance, number of batches
    assert sum(v.numel() for v in state.values()) == sum(n.values())
    assert segmenter.n_trainable() == n["adapter"] + 2 * width + 2


def test_the_seed_alone_decides_the_initial_adapter_and_head() -> None:
    def state(seed: int) -> State:
        torch.manual_seed(99 - seed)  # what ran before does not matter
        spec = BackboneSpec("tiny_dinov2", "random", tile=56)
        return Segmenter(spec, lora(), "pyramid", seed, build_backbone(spec.arch, spec.source)).trained_state()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    drawn = [k for k, v in first.items() if v.ndim > 1 and ".lora_B" not in k]
    assert drawn
    assert not [k for k in drawn if torch.equal(first[k], other[k])]
    for key, value in first.items():
        if ".lora_A" in key:  # Kaiming-uniform with peft's a = sqrt(5): the bound is 1 / sqrt(fan in)
            assert 0.5 / DIM**0.5 < float(value.abs().max()) <= 1 / DIM**0.5
        assert ".lora_B" not in key or not value.any()


def test_the_optimiser_gets_every_parameter_that_is_trained_once() -> None:
    spec = BackboneSpec("tiny_dinov2", "random", tile=56)
    segmenter = Segmenter(spec, lora(), "pyramid", 0, build_backbone(spec.arch, spec.source))
    groups = segmenter.trainable()
    given = [id(p) for group in groups.values() for p in group]
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for p in nn.Module.parameters(segmenter) if p.requires_grad}
