"""A training step of each regime, and of LoRA as one writes it with timm and peft (fp32, one loop).

A step: forward, loss, backward, clipping and AdamW on a batch of four tiles, with the head
`pyramid`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.timing import print_table, seconds
from benchmarks.workplace import emadapt, train, workplace, write_study, write_volume
from emadapt.models.backbones import pretrained
from emadapt.models.device import autocast, device, peak_mb
from emadapt.models.heads import HEADS
from emadapt.study.backbones import BackboneSettings

ARCH, TILE, BATCH, STEPS = "dinov2_s", 252, 4, 6
REGIMES: dict[str, dict[str, Any]] = {
    "frozen": {"kind": "frozen"},
    "lora_last_k": {"kind": "lora_last_k", "k": 3},
    "bitfit": {"kind": "bitfit"},
    "lora": {"kind": "lora"},
    "full": {"kind": "full"},
    "full_checkpointing": {"kind": "full", "gradient_checkpointing": True},
    "resunet3d": {"kind": "resunet3d", "patch": [6, 64, 64]},
}


def by_emadapt(
    arch: str = ARCH, tile: int = TILE, regimes: dict[str, dict[str, Any]] = REGIMES
) -> list[dict[str, Any]]:
    """Rows of regimes, from the history of a short training."""
    rows = []
    with workplace():
        write_volume("noise", 24, 2 * tile)
        settings = {"steps_per_epoch": STEPS, "epochs": 1, "batch": BATCH}
        write_study({"arch": arch, "tile": tile}, regimes, settings)
        emadapt("ingest", "noise")
        for name in regimes:
            history = train(name)
            row = {"regime": name, "seconds": history["seconds"] / STEPS}
            rows.append(row | {"peak_mb": history["peak_mb"]})
    return rows


def by_peft(arch: str = ARCH, tile: int = TILE, precision: str = "fp32") -> dict[str, Any]:
    """The same adapters and head as a page of a tutorial has them."""
    from peft import LoraConfig, get_peft_model

    backbone = pretrained(BackboneSettings(arch=arch, source="random")).to(device())
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["attn.qkv", "attn.proj"])
    vit: Any = get_peft_model(backbone.vit, config).train()
    head = HEADS["pyramid"](backbone.arch.dim, len(backbone.blocks), 2).train().to(device())
    trained = [p for model in (vit, head) for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=5e-4)
    images = torch.rand(BATCH, 3, tile, tile, device=device())
    labels = torch.randint(2, (BATCH, tile, tile), device=device())
    indices = [block - 1 for block in backbone.blocks]

    def step() -> None:
        with autocast(precision):
            tokens = vit.base_model.model.forward_intermediates(
                images, indices=indices, norm=True, intermediates_only=True
            )
            loss = nn.functional.cross_entropy(head(tokens, (tile, tile)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    taken = seconds(step, STEPS)
    peak = peak_mb()
    return {"regime": "lora by timm and peft", "seconds": taken, "peak_mb": peak}


if __name__ == "__main__":
    print_table([*by_emadapt(), by_peft()])
    print("Seconds of a step with its share of one validation; peak memory of the process.")
