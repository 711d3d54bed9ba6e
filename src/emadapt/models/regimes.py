"""Regimes: what of the backbone is trained. Each is the identity at the start and saves only what it changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from emadapt.errors import InputError
from emadapt.models.backbones import Backbone
from emadapt.study.study import RegimeSettings
from emadapt.training.domain_classifier import key_of

State = dict[str, torch.Tensor]


def apply_regime(backbone: Backbone, spec: RegimeSettings, datasets: Sequence[str] = ()) -> None:
    """Make the backbone trainable as `spec` says, in place; blocks above the last one that the head sees never are.

    - `frozen`, `ridge`, `knn`, `unet2d`, `resunet3d`, `sam2`, `mitonet` but for `finetune`: nothing.
    - `lora`: low-rank adapters (Hu et al. 2022, arXiv 2106.09685) on the qkv and output projections of every block's attention,
      A Kaiming-uniform and B zero, so tokens do not change at the start.
    - `lora_last_k`: the same in the last `k` of the blocks that run.
    - `dora`: the same with each weight's direction and magnitude apart (Liu et al. 2024, arXiv 2402.09353).
    - `bitfit`: biases (Ben Zaken et al. 2022, arXiv 2106.10199) and the weights of LayerNorms. Not the LayerScale factors, which
      are neither.
    - `full`, `finetune` of `mitonet`: everything.

    With `align: routed`, low-rank adapters are there once for each of `datasets`, alike at the start; `use_adapter` chooses.

    Raises:
        InputError: the rank is larger than the backbone is wide, or `k` than it is deep.
    """
    backbone.requires_grad_(False)
    if spec.finetune:
        backbone.requires_grad_(True)
    elif spec.low_rank:
        _add_adapters(
            backbone,
            spec,
            [key_of(name) for name in datasets] if spec.align == "routed" else ["default"],
        )
    elif spec.kind in ("bitfit", "full"):
        for name, parameter in _parameters_that_run(backbone).items():
            parameter.requires_grad = (
                spec.kind == "full" or name.endswith(".bias") or _is_norm(backbone, name)
            )
    if spec.checkpointing:
        backbone.vit.set_grad_checkpointing(True)


def cut_of(backbone: Backbone, spec: RegimeSettings) -> int | None:
    """Number of blocks below the first adapted one, whose output `lora_last_k` keeps in the token cache; None for the others.

    Raises:
        InputError: there are fewer than `k` blocks.
    """
    if spec.kind != "lora_last_k":
        return None
    last = backbone.blocks[-1]
    if spec.k > last:
        raise InputError(
            f"regime with k = {spec.k}",
            found=f"more than the {last} blocks of {backbone.arch_name} that run",
            expected=f"k of 1 to {last}",
            do="Lower `k`.",
        )
    return last - spec.k


def adapter_state(backbone: Backbone) -> State:
    """What the regime may have changed, by name: a few MB of factors or vectors, for `full` the whole backbone."""
    if _is_single(backbone):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(backbone.vit))
    return {name: p for name, p in backbone.vit.named_parameters() if p.requires_grad}


def load_adapter(backbone: Backbone, state: State) -> None:
    """Put back what `adapter_state` gave, into a backbone under the same regime.

    Raises:
        InputError: the tensors do not fit.
    """
    now = adapter_state(backbone)
    have = {k: tuple(v.shape) for k, v in now.items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if have != found:
        odd = sorted(k for k in have.keys() | found.keys() if have.get(k) != found.get(k))
        raise InputError(
            "adapter",
            found=f"{len(odd)} tensors that do not fit, e.g. {odd[0]}",
            expected="the adapter of this regime",
            do="Load it with the backbone and regime that it was trained with.",
        )
    if _is_single(backbone):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(backbone.vit, state)
        return
    with torch.no_grad():
        for name, parameter in now.items():
            parameter.copy_(state[name])


def merge(backbone: Backbone) -> None:
    """Fold adapters into the weights for inference: the same tokens up to rounding, at the frozen model's speed."""
    for layer in _adapters(backbone):
        layer.merge()


def unmerge(backbone: Backbone) -> None:
    """Undo `merge`."""
    for layer in _adapters(backbone):
        layer.unmerge()


def use_adapter(backbone: Backbone, dataset: str) -> None:
    """Let tokens pass through the adapters of a dataset (`align: routed`); merged ones are exchanged."""
    for layer in _adapters(backbone):
        if was_merged := layer.merged:
            layer.unmerge()
        layer.set_adapter(key_of(dataset))
        if was_merged:
            layer.merge()
    _train_all_adapters(backbone)


@contextmanager
def pretrained(backbone: Backbone) -> Iterator[None]:
    """Within, low-rank adapters are off: tokens are those of the backbone as pretrained."""
    layers = _adapters(backbone)
    merged = [layer for layer in layers if layer.merged]
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for layer in merged:
            layer.merge()
        _train_all_adapters(backbone)


def parameter_groups(
    backbone: Backbone, spec: RegimeSettings, rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: what the regime trains, with learning rates and weight decays.

    Low-rank factors have one rate, and so has MitoNet. In `full` it falls by `layer_decay` from block to block, downwards from
    the last, which has `rate` (Clark et al. 2020, arXiv 2003.10555). But for LoRA's factors and MitoNet, weights decay and
    vectors do not: that would pull norms towards zero.
    """
    if not any(p.requires_grad for p in backbone.vit.parameters()):
        return []
    if spec.kind in ("lora", "lora_last_k", "mitonet"):
        return [
            {
                "params": [p for p in backbone.vit.parameters() if p.requires_grad],
                "lr": rate,
                "weight_decay": weight_decay,
            }
        ]
    decay = spec.layer_decay if spec.kind == "full" else 1.0
    groups = param_groups_layer_decay(
        backbone.vit, weight_decay, backbone.vit.no_weight_decay(), layer_decay=decay
    )
    return [
        {"params": g["params"], "lr": rate * g["lr_scale"], "weight_decay": g["weight_decay"]}
        for g in groups
    ]


def _add_adapters(backbone: Backbone, spec: RegimeSettings, names: Sequence[str]) -> None:
    if spec.rank > backbone.arch.dim:
        raise InputError(
            f"regime of rank {spec.rank}",
            found=f"a rank above the width {backbone.arch.dim} of {backbone.arch_name}",
            expected="a rank of 1 up to the width",
            do="Lower `rank`.",
        )
    from peft import (  # takes seconds, which frozen units need not wait for
        LoraConfig,
        inject_adapter_in_model,
    )

    blocks = "|".join(map(str, range(cut_of(backbone, spec) or 0, backbone.blocks[-1])))
    targets = "|".join(re.escape(t) for t in backbone.lora_targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so a fraction will do
        lora_dropout=spec.dropout,
        target_modules=rf"blocks\.({blocks})\.({targets})",
        use_dora=spec.kind == "dora",
    )
    drawn_from = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Already found a `peft_config` attribute"
        )  # several adapters are meant
        for name in names:
            torch.set_rng_state(drawn_from)
            inject_adapter_in_model(config, backbone.vit, name)
    _train_all_adapters(backbone)


def _parameters_that_run(backbone: Backbone) -> dict[str, nn.Parameter]:
    above = tuple(f"blocks.{n}." for n in range(backbone.blocks[-1], backbone.arch.depth))
    return {name: p for name, p in backbone.vit.named_parameters() if not name.startswith(above)}


def _is_norm(backbone: Backbone, parameter: str) -> bool:
    return isinstance(backbone.vit.get_submodule(parameter.rpartition(".")[0]), nn.LayerNorm)


def _train_all_adapters(backbone: Backbone) -> None:
    """Peft freezes all adapters but the active one."""
    for name, parameter in backbone.vit.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)


def _is_single(backbone: Backbone) -> bool:
    """Whether there is one low-rank adapter, whose name peft leaves out of the state."""
    return any("default" in layer.lora_A for layer in _adapters(backbone))


def _adapters(backbone: Backbone) -> list[Any]:
    """Peft's `LoraLayer`s, found without importing peft."""
    return [m for m in backbone.vit.modules() if hasattr(m, "lora_A")]
