"""What a training step costs under each regime, and what one would write with peft alone, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from benchmarks.timing import median_timed
from emadapt.data.crops import Cached
from emadapt.models import backbones
from emadapt.models.archs import BACKBONES, get_arch
from emadapt.models.backbones import create_vit
from emadapt.models.device import autocast, device
from emadapt.models.heads import HEADS
from emadapt.models.regimes import parameter_groups
from emadapt.models.segmenter import build_frozen, build_segmenter
from emadapt.study.study import BackboneSettings, RegimeSettings, TrainSettings
from emadapt.training.fit import loss_function

Row = dict[str, Any]
Logits = Callable[[], torch.Tensor]

NAIVE = "lora, peft alone"
FUSED = "lora, fused attention"
BATCH, TILE = 4, 252
PATCH = (6, 64, 64)


def regimes_benchmark(
    arch: str = "dinov2_s", tile: int = TILE, steps: int = 5, repeats: int = 1
) -> list[Row]:
    """A step of forward, loss, backward, clipping and AdamW on a batch of 4 tiles that is at hand, with the head `pyramid`.

    `resunet3d` has no backbone and sees 4 patches of 6 x 64 x 64 voxels, 0.4 times as many as the others pixels.
    `lora_last_k` adapts the last quarter of the blocks and starts from what is cached, `frozen` from cached tokens. The last rows
    are `lora` with torch's fused attention, which is not used on a CPU in bf16 for few tokens (`backbones.PLAIN_TOKENS`), and as
    one writes it with timm and peft: fp32, the whole model in one loop.

    Args:
        arch: of the backbone; its weights are random.
        tile: its side.
        steps: that are timed, after one that is not.
        repeats: rounds over all regimes; medians count.

    Returns:
        Rows: regime; trained parameters and, of them in the backbone, their share of it; seconds by the clock and by the
        processor; peak_mb of the process (on a GPU: of its memory); ratio, lora's seconds over this one's (of the processor's,
        which other work on the machine changes less; on a GPU of the clock's).
    """
    quarter = get_arch(arch).depth // 4
    kinds = {k: RegimeSettings(k) for k in ("frozen", "lora", "dora", "bitfit", "full")}
    kinds["resunet3d"] = RegimeSettings("resunet3d", patch=PATCH)
    kinds |= {
        "lora_last_k": RegimeSettings("lora_last_k", k=quarter),
        "full, checkpointing": RegimeSettings("full", checkpointing=True),
    }
    jobs = [(name, kinds.get(name, kinds["lora"])) for name in (*kinds, FUSED, NAIVE)]
    threads = torch.get_num_threads()
    found: dict[str, list[Row]] = {name: [] for name, _ in jobs}
    for _ in range(repeats):
        for (
            name,
            regime,
        ) in jobs:  # a new process each: memory that another left behind does not count
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found[name].append(
                    process.submit(_measure, name, regime, arch, tile, steps, threads).result()
                )
    rows = []
    for name, runs in found.items():
        numbers = {
            key: statistics.median(r[key] for r in runs)
            for key in ("seconds", "cpu_seconds", "peak_mb")
        }
        rows.append(
            {"regime": name, "trained": runs[0]["trained"], "share": runs[0]["share"], **numbers}
        )
    clock = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    lora = next(row[clock] for row in rows if row["regime"] == "lora")
    return [{**row, "ratio": lora / row[clock]} for row in rows]


def _measure(
    name: str, regime: RegimeSettings, arch: str, tile: int, steps: int, threads: int
) -> Row:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name == FUSED:  # in this process alone
        backbones.PLAIN_TOKENS = 0
    size = regime.patch if regime.is_3d else (tile, tile)
    images = torch.rand(BATCH, 1, *size, device=device())
    labels = (torch.rand(BATCH, 1, *size, device=device()) > 0.9).long()
    logits, optimiser, facts = (_naive if name == NAIVE else _ours)(arch, regime, images)
    loss_of, trained = (
        loss_function("dice_ce"),
        [p for g in optimiser.param_groups for p in g["params"]],
    )

    def step() -> None:
        loss_of(logits(), labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    seconds, cpu_seconds = median_timed(step, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {**facts, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak}


def _ours(
    arch: str, regime: RegimeSettings, images: torch.Tensor
) -> tuple[Logits, torch.optim.Optimizer, Row]:
    spec, train = BackboneSettings(arch, "random"), TrainSettings()
    segmenter = build_segmenter(spec, regime, regime.own_head or "pyramid", 0).to(device()).train()
    batch: torch.Tensor | Cached = images
    if regime.kind == "frozen":
        with torch.no_grad():
            batch = torch.cat(segmenter.backbone(images), 1).half()
    elif segmenter.cut is not None:
        below, entering = segmenter.backbone.entering(images, segmenter.cut)
        batch = Cached(torch.cat(below, 1).half(), entering.half())
    groups = parameter_groups(segmenter.backbone, regime, train.adapter_lr, train.weight_decay)
    optimiser = torch.optim.AdamW(
        [{"params": segmenter.head.parameters(), "lr": train.head_lr}, *groups]
    )

    def logits() -> torch.Tensor:
        with autocast(train.precision):
            return torch.as_tensor(segmenter(batch, (images.shape[-2], images.shape[-1])))

    return logits, optimiser, {"trained": segmenter.n_trainable(), "share": segmenter.share()}


def _naive(
    arch: str, regime: RegimeSettings, images: torch.Tensor
) -> tuple[Logits, torch.optim.Optimizer, Row]:
    """The same adapters and head as a page of a tutorial has them."""
    from peft import LoraConfig, get_peft_model

    facts, blocks = BACKBONES[arch], build_frozen(BackboneSettings(arch, "random")).blocks
    config = LoraConfig(
        r=regime.rank, lora_alpha=regime.alpha, target_modules=["attn.qkv", "attn.proj"]
    )  # type: ignore[arg-type]
    vit: Any = get_peft_model(create_vit(facts), config).to(device()).train()
    head = HEADS["pyramid"](facts.dim, len(blocks)).to(device()).train()
    mean, std = (torch.tensor(v, device=device()).view(1, 3, 1, 1) for v in (facts.mean, facts.std))
    trained = [p for model in (vit, head) for p in model.parameters() if p.requires_grad]

    def logits() -> torch.Tensor:
        x = (images.expand(-1, 3, -1, -1) - mean) / std
        tokens = vit.base_model.model.forward_intermediates(
            x, indices=[b - 1 for b in blocks], norm=True, intermediates_only=True
        )
        return torch.as_tensor(head(tokens, (images.shape[-2], images.shape[-1])))

    adapters = sum(p.numel() for p in vit.parameters() if p.requires_grad)
    share = adapters / (sum(p.numel() for p in vit.parameters()) - adapters)
    return (
        logits,
        torch.optim.AdamW(trained, lr=5e-4),
        {"trained": sum(p.numel() for p in trained), "share": share},
    )
