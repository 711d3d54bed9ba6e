"""Fit many heads at once: `emadapt.training.fit.fit` for a `Stack`, with a checkpoint and an end of its own for each member."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.crops import load_epoch, plan_epoch
from emadapt.data.ingest import Volume
from emadapt.data.tiles import blend, geometry_of
from emadapt.errors import EmadaptError
from emadapt.models.predict import BATCH_TILES, Probability
from emadapt.models.tokens import TokenView
from emadapt.study.study import TrainSettings
from emadapt.sweep.stacked import Stack, State, loss_and_gradient
from emadapt.training.fit import Inputs, Progress, rate_factor, stalled, val_slices


@dataclass
class Member:
    """One head of a stack: what is its own, and what becomes of it.

    Attributes:
        train: its settings; all members have the same but for `head_lr` and `weight_decay`.
        seed: of its initial weights.
        scratch: folder of its checkpoint.
        on_epoch: called after each epoch with its metrics and the steps so far; if it raises, the member leaves the stack.
        error: why it left, if it did.
        best: tensors of its best epoch, as `Stack.state`.
        scored: validation IoU of its best epoch over all validation slices, if it did not leave.
    """

    train: TrainSettings
    seed: int
    scratch: Path
    on_epoch: Callable[[dict[str, float], int], None]
    progress: Progress = field(default_factory=Progress)
    error: Exception | None = None
    best: dict[str, State] = field(default_factory=dict)
    scored: dict[str, float] = field(default_factory=dict)


def fit_stacked(inputs: Inputs, members: list[Member], seed: int) -> None:
    """Train the members from their checkpoints on and score the best epoch of each; the outcome is in the members.

    Args:
        inputs: of `emadapt.training.train.prepare`, from the token cache.
        members: at least one.
        seed: of the order of the data, which all share.
    """
    saved = [_read(m.scratch) for m in members]
    for epoch in sorted(
        {s["progress"]["epoch"] if s else 0 for s in saved}
    ):  # members at different epochs see different data
        group = [
            (m, s)
            for m, s in zip(members, saved, strict=True)
            if (s["progress"]["epoch"] if s else 0) == epoch
        ]
        _fit_group(inputs, [m for m, _ in group], [s for _, s in group], seed)
    done = [m for m in members if m.error is None]
    shared = (
        inputs.segmenter.head_name == "linear"
    )  # `Stack.shared_norm`, while each has its best at its own epoch
    for together in [[m] for m in done] if shared else [done] if done else []:
        stack = _stack(inputs, together)
        for i, member in enumerate(together):
            stack.load(i, member.best, 0)
        for member, scored in zip(together, score_stacked(stack, inputs, every=0), strict=True):
            member.scored = scored


def _fit_group(inputs: Inputs, here: list[Member], saved: list[dict[str, Any]], seed: int) -> None:
    stack, train = _stack(inputs, here), here[0].train
    for i, (member, state) in enumerate(zip(here, saved, strict=True)):
        if state:
            stack.load(i, state["state"], state["steps"])
            member.progress, member.best = Progress(**state["progress"]), state["best"]
        else:
            member.best = stack.state(i)
    rows = inputs.data.rows()
    steps = len(plan_epoch(rows, train, seed, 0))
    factor = rate_factor(train, steps)
    epoch = here[0].progress.epoch
    while epoch < train.epochs:
        here = _keep(
            stack, here, [m.error is None and not stalled(m.progress, train) for m in here]
        )
        if not here:
            return
        started = time.perf_counter()
        losses = [
            stack.step(batch, factor(stack.steps))
            for batch in load_epoch(
                inputs.data, plan_epoch(rows, train, seed, epoch), train.workers
            )
        ]
        loss = torch.stack(losses).mean(0).tolist()
        scores = score_stacked(
            stack, inputs, every=train.val_slices, loss=train.monitor == "val_loss"
        )
        epoch += 1
        seconds = (time.perf_counter() - started) / len(here)
        for i, member in enumerate(here):
            metrics = {
                "train/loss": loss[i],
                "train/lr_head": member.train.head_lr * factor(stack.steps),
                **{f"val/{k}": scores[i][k] for k in ("iou", "loss") if k in scores[i]},
            }
            _end_epoch(stack, i, member, metrics, seconds)


def _end_epoch(
    stack: Stack, i: int, member: Member, metrics: dict[str, float], seconds: float
) -> None:
    """Keep the member's best, write its checkpoint, tell its owner; a member that fails takes nobody with it."""
    progress = member.progress
    if not math.isfinite(metrics["train/loss"]):
        member.error = EmadaptError(
            f"epoch {progress.epoch}: the loss is not finite; lower head_lr"
        )
        return
    value = metrics["val/iou"] if member.train.monitor == "val_iou" else -metrics["val/loss"]
    state = stack.state(i)
    if value > progress.best:
        progress.best, progress.best_epoch = value, progress.epoch
        member.best = state
    progress.epoch += 1
    progress.seconds += seconds
    progress.history.append(metrics)
    member.scratch.mkdir(parents=True, exist_ok=True)
    temporary = member.scratch / ".checkpoint.part"
    torch.save(
        {"progress": vars(progress), "state": state, "best": member.best, "steps": stack.steps},
        temporary,
    )
    temporary.replace(member.scratch / "checkpoint.pt")
    try:
        member.on_epoch(metrics, stack.steps)
    except Exception as error:  # pruned, or whatever ended this one member
        member.error = error


def _read(scratch: Path) -> dict[str, Any]:
    path = scratch / "checkpoint.pt"
    return torch.load(path, weights_only=True, map_location="cpu") if path.is_file() else {}


def _stack(inputs: Inputs, members: list[Member]) -> Stack:
    backbone = inputs.segmenter.backbone
    settings = [m.train for m in members]
    same = {dataclasses.replace(s, head_lr=1.0, weight_decay=0.0) for s in settings}
    if len(same) > 1:
        raise ValueError("members of a stack differ in more than head_lr and weight_decay")
    return Stack(
        inputs.segmenter.head_name,
        backbone.arch.dim,
        len(backbone.blocks),
        settings,
        [m.seed for m in members],
    )


def _keep(stack: Stack, here: list[Member], stays: list[bool]) -> list[Member]:
    rows = [i for i, stay in enumerate(stays) if stay]
    if len(rows) < len(here):
        stack.keep(rows)
    return [here[i] for i in rows]


def score_stacked(
    stack: Stack, inputs: Inputs, every: int, loss: bool = False
) -> list[dict[str, float]]:
    """What `emadapt.training.fit.score` gives, for each member."""
    ious: list[npt.NDArray[np.float64]] = []
    losses: list[npt.NDArray[np.float32]] = []
    for volume, views in zip(inputs.volumes, inputs.views, strict=True):
        hits, total = np.zeros(len(stack)), np.zeros(len(stack))
        for z in val_slices(volume, every):
            label = volume.label[z] > 0
            probability = np.stack(_predict(stack, inputs, volume, views[0], z))
            found = probability > 0.5
            hits += (found & label).sum((1, 2))
            total += (found | label).sum((1, 2))
            if loss:
                margin = torch.from_numpy(probability).clamp(1e-6, 1 - 1e-6).logit()[None]
                losses.append(
                    loss_and_gradient(
                        stack.train.loss, margin, torch.from_numpy(label).float()[None]
                    )[0].numpy()
                )
        ious.append(np.where(total > 0, hits / np.maximum(total, 1), 1.0))
    scored = [
        {
            "iou": float(np.mean(own)),
            **{f"iou.{v.name}": float(iou) for v, iou in zip(inputs.volumes, own, strict=True)},
        }
        for own in zip(*ious, strict=True)
    ]
    if losses:
        for own, value in zip(scored, np.mean(losses, 0), strict=True):
            own["loss"] = float(value)
    return scored


def _predict(
    stack: Stack, inputs: Inputs, volume: Volume, view: TokenView, z: int
) -> list[Probability]:
    """Foreground probabilities (Y, X) of one slice by each member."""
    spec, patch = inputs.segmenter.spec, inputs.segmenter.backbone.arch.patch
    geo = geometry_of(volume, spec, patch)
    rows = view.rows_of_slice(z)
    tiles = []
    for start in range(0, len(rows), BATCH_TILES):
        block = view.tokens[
            rows[start] : rows[start] + min(BATCH_TILES, len(rows) - start)
        ]  # a slice's rows are neighbours
        tiles.append(
            stack.probabilities(torch.from_numpy(np.array(block)), geo.tile, spec.precision)
            .cpu()
            .numpy()
        )
    corners = [(int(y), int(x)) for _, y, x in view.index[rows]]
    return [blend(own, corners, geo) for own in np.concatenate(tiles, 1)]
