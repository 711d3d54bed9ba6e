"""Print what the study costs: FLOPs counted on the real networks, hours and memory.

python studies/paper/cost.py [TFLOP/s that a GPU sustains in fp32; 25 without it]
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from emadapt.models.archs import BACKBONES, create_vit
from emadapt.models.heads import HEADS
from emadapt.study.loading import load_study

STUDY = load_study(Path(__file__).with_name("study.yaml"))
SLICES = {"lucchi": (165, 768, 1024), "lucchi_lex": (165, 768, 1024), "vnc": (20, 1024, 1024)}
"""Slices to divide, and their sides. Lucchi is published with a test volume of its own."""
EPOCHS = 100
"""Hours are of so many. Training ends when 20 brought nothing, at the latest after 1000."""


def slice_cost(arch_name: str, sides: tuple[int, int]) -> dict[str, float]:
    """A training step on a slice with each regime, and the backbone alone: FLOPs, GB."""
    arch = BACKBONES[arch_name]
    with torch.device("meta"):
        vit = create_vit(arch).requires_grad_(False)
        head = HEADS[STUDY.train.head](arch.dim, 1)
        scale = STUDY.backbone_settings[arch_name].longest_edge / max(sides)
        shown = tuple(round(side * scale / arch.patch) * arch.patch for side in sides)
        image = torch.empty(1, 3, *shown, requires_grad=True)  # as LoRA in the first block wants it
    last: dict[str, Any] = {"indices": [arch.depth - 1], "intermediates_only": True}
    tokens = shown[0] * shown[1] // arch.patch**2
    with counted(tokens) as frozen:
        maps = [torch.empty(1, arch.dim, *(side // arch.patch for side in shown), device="meta")]
        head(maps, shown).sum().backward()
    with counted(tokens) as lora:
        maps = vit.forward_intermediates(image, norm=True, output_fmt="NCHW", **last)
        head(maps, shown).sum().backward()
    with counted(tokens) as forward, torch.no_grad():
        vit.forward_intermediates(image, norm=True, output_fmt="NCHW", **last)
    weights = sum(p.nbytes for p in vit.parameters()) / 1e9
    return {
        "frozen": frozen["flops"],
        "frozen_gb": frozen["gb"],
        "lora": lora["flops"],
        "lora_gb": lora["gb"] + weights,
        "forward": forward["flops"],
    }


@contextmanager
def counted(tokens: int) -> Iterator[dict[str, float]]:
    """FLOPs, and GB kept for the backward pass, of what runs within."""
    found: dict[str, float] = {}
    kept = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Products of all tokens with all are kept by no fused attention.
        if tensor.dim() < 2 or min(tensor.shape[-2:]) < tokens:
            kept.append(tensor.nbytes)
        return tensor

    with FlopCounterMode(display=False) as count, saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    found |= {"flops": count.get_total_flops(), "gb": sum(kept) / 1e9}


def main(tflops: float) -> None:
    """Print a row for each backbone, regime and training set."""
    print(f"{EPOCHS} epochs at {tflops:g} TFLOP/s sustained; fp32, a slice a step")
    print(f"{'units':36} {'GFLOP a step':>12} {'GB':>5} {'hours':>6}")
    total = 0.0
    for backbone in STUDY.backbones:
        costs = {name: slice_cost(backbone, SLICES[name][1:]) for name in STUDY.datasets}
        for regime in STUDY.regimes:
            for train_set in STUDY.train_sets:
                flops = 0.0
                members = STUDY.train_set_settings[train_set].datasets
                for name in members:
                    val, test = STUDY.split.val, 0.0 if "lucchi" in name else STUDY.split.test
                    trained, validated = (SLICES[name][0] * s for s in (1 - val - test, val))
                    forward = costs[name]["forward"] if regime == "lora" else 0.0  # cached tokens
                    flops += EPOCHS * (trained * costs[name][regime] + validated * forward)
                hours = flops / tflops / 1e12 / 3600
                total += hours * len(STUDY.seeds)
                largest = max(costs[name][regime] for name in members) / 1e9
                memory = max(costs[name][f"{regime}_gb"] for name in members)
                unit = f"{backbone}-{regime}-{train_set}"
                print(f"{unit:36} {largest:12.0f} {memory:5.1f} {hours:6.2f}")
    print(f"{len(STUDY.units())} units: {total:.0f} GPU hours for {EPOCHS} epochs each")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 25.0)
