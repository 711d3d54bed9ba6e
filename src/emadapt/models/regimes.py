"""Regimes: what of the backbone is trained. Each is the identity at the start and saves only what it changed."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from emadapt.config import RegimeSpec
from emadapt.errors import InputError
from emadapt.models.backbones import Backbone

State = dict[str, torch.Tensor]


def apply_regime(backbone: Backbone, spec: RegimeSpec) -> None:
    """Make the backbone trainable as `spec` says, in place.

    `lora`: low-rank adapters (Hu et al. 2022) on the qkv and output projections of every block's attention, A
    Kaiming-uniform and B zero, so tokens do not change at the start. Others: nothing.

    Raises:
        InputError: the rank is larger than the backbone is wide.
    """
    backbone.requires_grad_(False)
    if spec.pretrained_tokens or spec.kind == "unet2d":
        return
    if spec.rank > backbone.arch.dim:
        raise InputError(f"regime of rank {spec.rank}",
                         found=f"a rank above the width {backbone.arch.dim} of {backbone.arch_name}",
                         expected="a rank of 1 up to the width", do="Lower `rank`.")  # fmt: skip
    targets = "|".join(re.escape(t) for t in backbone.lora_targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so a fraction will do
        lora_dropout=spec.dropout,
        target_modules=rf".*\.({targets})",
    )
    inject_adapter_in_model(config, backbone.vit)


def adapter_state(backbone: Backbone) -> State:
    """The adapter's tensors by name, empty for `frozen`; a few MB."""
    if not _adapters(backbone):
        return {}
    return dict(get_peft_model_state_dict(backbone.vit))


def load_adapter(backbone: Backbone, state: State) -> None:
    """Put back what `adapter_state` gave, into a backbone under the same regime.

    Raises:
        InputError: the tensors do not fit.
    """
    if not state and not _adapters(backbone):
        return
    have = {k: tuple(v.shape) for k, v in adapter_state(backbone).items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if have != found:
        odd = sorted(k for k in have.keys() | found.keys() if have.get(k) != found.get(k))
        raise InputError("adapter", found=f"{len(odd)} tensors that do not fit, e.g. {odd[0]}",
                         expected="the adapter of this regime",
                         do="Load it with the backbone and regime that it was trained with.")  # fmt: skip
    set_peft_model_state_dict(backbone.vit, state)


def merge(backbone: Backbone) -> None:
    """Fold the adapters into the weights for inference: the same tokens up to rounding, at the frozen model's speed."""
    for layer in _adapters(backbone):
        layer.merge()


def unmerge(backbone: Backbone) -> None:
    """Undo `merge`."""
    for layer in _adapters(backbone):
        layer.unmerge()


def _adapters(backbone: Backbone) -> list[LoraLayer]:
    return [m for m in backbone.vit.modules() if isinstance(m, LoraLayer)]
