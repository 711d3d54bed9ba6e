"""Adapters: what is trained of a pretrained backbone. At the start they change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from emadapt.errors import InputError
from emadapt.models.backbones import LORA_TARGETS, Backbone
from emadapt.models.convert import misfit

State = dict[str, torch.Tensor]


def add_lora(
    backbone: Backbone, rank: int, alpha: float, dropout: float, first_block: int = 0
) -> None:
    """LoRA on the qkv and output projections of attention (Hu et al. 2022, arXiv 2106.09685).

    A is drawn Kaiming-uniform and B is zero, so tokens do not change at the start.

    Args:
        backbone: changed in place; blocks above the last one that the head sees get none.
        rank: of the factors.
        alpha: the product of the factors is scaled by alpha / rank.
        dropout: share of the adapter's inputs that training drops.
        first_block: number of blocks below that get no adapter.

    Raises:
        InputError: the rank is larger than the backbone is wide.
    """
    if rank > backbone.arch.dim:
        raise InputError(
            f"regime of rank {rank}",
            found=f"a rank above the width {backbone.arch.dim} of {backbone.arch_name}",
            expected="a rank of 1 up to the width",
            do="Lower `rank`.",
        )
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    blocks = "|".join(map(str, range(first_block, backbone.blocks[-1])))
    targets = "|".join(map(re.escape, LORA_TARGETS))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a fraction will do
        lora_dropout=dropout,
        target_modules=rf"blocks\.({blocks})\.({targets})",
    )
    inject_adapter_in_model(config, backbone.vit)


def train_biases(backbone: Backbone) -> None:
    """Biases and LayerNorms' weights, as BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""
    for name, parameter in _parameters_that_run(backbone).items():
        module = backbone.vit.get_submodule(name.rpartition(".")[0])
        parameter.requires_grad = name.endswith(".bias") or isinstance(module, nn.LayerNorm)


def train_all(backbone: Backbone) -> None:
    """Every weight up to the last block that the head sees."""
    for parameter in _parameters_that_run(backbone).values():
        parameter.requires_grad = True


def cut_below(backbone: Backbone, k: int) -> int:
    """Number of blocks below the last `k` of those that run.

    Raises:
        InputError: there are fewer than `k` blocks.
    """
    last = backbone.blocks[-1]
    if k > last:
        raise InputError(
            f"regime with k = {k}",
            found=f"more than the {last} blocks of {backbone.arch_name} that run",
            expected=f"k of 1 to {last}",
            do="Lower `k`.",
        )
    return last - k


def adapter_state(network: nn.Module) -> State:
    """What training may have changed in a network, by name."""
    if _lora_layers(network):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(network))
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def load_adapter(network: nn.Module, state: State) -> None:
    """Put back what `adapter_state` gave, into a network with the same adapter.

    Raises:
        InputError: the tensors do not fit.
    """
    now = adapter_state(network)
    if found := misfit(state, now):
        raise InputError(
            "adapter",
            found=found,
            expected="the adapter of this regime",
            do="Load it with the backbone and regime that it was trained with.",
        )
    if _lora_layers(network):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(network, state)
        return
    with torch.no_grad():
        for name, parameter in now.items():
            parameter.copy_(state[name])


def merge(network: nn.Module) -> None:
    """Fold LoRA's factors into the weights: the same tokens up to rounding, in less time."""
    for layer in _lora_layers(network):
        layer.merge()


def unmerge(network: nn.Module) -> None:
    """Undo `merge`."""
    for layer in _lora_layers(network):
        layer.unmerge()


def one_group(network: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """An optimiser's group for all that is trained of a network."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [{"params": trained, "lr": rate, "weight_decay": weight_decay}]


def vectors_apart(network: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups in which matrices decay and vectors do not: decay would pull norms towards zero."""
    from timm.optim import param_groups_weight_decay  # takes a second

    exempt = network.no_weight_decay()  # type: ignore[operator]
    groups = param_groups_weight_decay(network, weight_decay, no_weight_decay_list=exempt)
    return [{**group, "lr": rate} for group in groups if group["params"]]


Groups = Callable[[nn.Module, float, float], list[dict[str, Any]]]
"""A network, its learning rate and its weight decay to an optimiser's groups."""


def _parameters_that_run(backbone: Backbone) -> dict[str, nn.Parameter]:
    above = tuple(f"blocks.{n}." for n in range(backbone.blocks[-1], backbone.arch.depth))
    return {name: p for name, p in backbone.vit.named_parameters() if not name.startswith(above)}


def _lora_layers(network: nn.Module) -> list[Any]:
    """Peft's `LoraLayer`s, found without importing peft."""
    return [m for m in network.modules() if hasattr(m, "lora_A")]
