"""Fit a head, and an adapter where there is one: steps, validation, checkpoints. On a CPU the same inputs give the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emadapt.data.blocks import PatchDataset
from emadapt.data.crops import CropDataset, TokenDataset, deal, load_epoch, plan_epoch, with_absent
from emadapt.data.ingest import Volume
from emadapt.errors import EmadaptError
from emadapt.models import parallel
from emadapt.models.device import device
from emadapt.models.heads import BatchNorm
from emadapt.models.monai_parts import monai_part
from emadapt.models.predict import predict_slices
from emadapt.models.regimes import State, parameter_groups
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView
from emadapt.study.study import TrainSettings, Unit
from emadapt.training.joint import ALIGN, Plain

Data = CropDataset | TokenDataset | PatchDataset


@dataclass
class Progress:
    """Where training stands; what a checkpoint holds besides tensors."""

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0
    """Of the twin that was copied; 0: this process's own."""


def loss_function(name: str) -> nn.Module:
    """MONAI's loss on (B, 2, H, W) logits and (B, 1, H, W) labels; over both classes, as the reference."""
    monai = monai_part("losses")
    common: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
    losses: dict[str, Callable[[], nn.Module]] = {
        "dice_ce": lambda: monai.DiceCELoss(**common),
        "dice": lambda: monai.DiceLoss(**common),
        "tversky": lambda: monai.TverskyLoss(
            **common, alpha=0.3, beta=0.7
        ),  # misses cost more than false alarms
    }
    return losses[name]()


@dataclass(frozen=True)
class Inputs:
    """What a unit is fitted with.

    Attributes:
        views: token cache entries per volume; empty where the backbone runs in the loop.
        labelled: how much of the training set counts as labelled, see `train.Labelled`.
        start: sha256 of the weights that `init_from` gave; empty without it.
        unlabelled: volumes that the data has without their labels.
        taken: the training of the unit whose weights were interpolated; None where there is one to be done.
    """

    segmenter: Segmenter
    volumes: list[Volume]
    views: list[list[TokenView]]
    data: Data
    labelled: dict[str, tuple[int, int]] = field(default_factory=dict)
    start: str = ""
    unlabelled: list[Volume] = field(default_factory=list)
    taken: Progress | None = None


def fit(
    inputs: Inputs,
    train: TrainSettings,
    unit: Unit,
    scratch: Path,
    on_epoch: Callable[[dict[str, float], int], None],
) -> Progress:
    """Train from the last checkpoint on; leaves the best epoch's weights in the segmenter.

    Args:
        inputs: of `train.prepare`.
        train: of the unit.
        unit: names and seeds it.
        scratch: folder of the checkpoint.
        on_epoch: called after each epoch with its metrics and number, from 1, the checkpoint written; may raise.
            Of several processes, in the first one.
    """
    segmenter, data, volumes, views = inputs.segmenter, inputs.data, inputs.volumes, inputs.views
    rows, rank, size = data.rows(), parallel.rank(), parallel.size()
    steps = len(plan_epoch(rows, train, unit.seed, 0))
    loss_of = loss_function(train.loss)
    scaler = torch.amp.GradScaler(device().type, enabled=train.precision == "fp16")
    joint = ALIGN[segmenter.regime.align](inputs, train, unit, loss_of, scaler)
    optimiser = _optimiser(segmenter, train, joint)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate_factor(train, steps))
    progress, best, average = _resume(
        scratch, segmenter, joint, optimiser, schedule, scaler, train.average
    )
    if not parallel.agree(progress.epoch):
        raise EmadaptError(
            f"unit {unit.name}: its processes see different checkpoints; {scratch} must be one folder for all"
        )
    shared_norm = size > 1 and any(isinstance(m, BatchNorm) for m in segmenter.modules())
    with _bar(f"train {unit.name}", shown=rank == 0) as bar:
        task = bar.add_task(
            "", total=train.epochs * steps, completed=progress.epoch * steps, words=""
        )
        while progress.epoch < train.epochs and not stalled(progress, train):
            started = time.perf_counter()
            # Dropout: the same after a resume, another one in each process.
            torch.manual_seed(digest_seed(unit.seed, progress.epoch, *([rank] if rank else [])))
            losses = []
            segmenter.train()
            plan = plan_epoch(rows, train, unit.seed, progress.epoch)
            own = (
                [deal(data, whole, rank, size) for whole in plan]
                if size > 1
                else joint.plan(plan, progress.epoch)
            )
            for whole, draws, batch in zip(
                plan, own, load_epoch(data, own, train.workers), strict=True
            ):
                groups = with_absent(data, whole, batch) if shared_norm else batch
                done = schedule.last_epoch / (train.epochs * steps)
                losses.append(
                    _step(
                        joint.backward(groups, draws, len(whole), done),
                        joint,
                        optimiser,
                        scaler,
                        train,
                    )
                )
                schedule.step()
                average.step(segmenter, schedule.last_epoch)
                bar.update(
                    task,
                    advance=1,
                    words=f"loss {losses[-1]:.3f}, val IoU {max(progress.best, 0):.3f}",
                )
            if not math.isfinite(sum(losses)):
                where = f"unit {unit.name}, epoch {progress.epoch}"
                raise EmadaptError(f"{where}: the loss is not finite; lower head_lr or adapter_lr")
            with average.in_place(segmenter):
                scored, candidate = (
                    score(segmenter, volumes, views, every=train.val_slices, loss_of=loss_of),
                    _copy(segmenter),
                )
            metrics = {
                "train/loss": float(np.mean(losses)),
                "train/lr_head": float(schedule.get_last_lr()[0]),
            }
            metrics |= joint.metrics() | {"val/iou": scored["iou"], "val/loss": scored["loss"]}
            value = metrics["val/iou"] if train.monitor == "val_iou" else -metrics["val/loss"]
            if value > progress.best:
                progress.best, progress.best_epoch = value, progress.epoch
                best = candidate
            progress.epoch += 1
            progress.seconds += time.perf_counter() - started
            progress.history.append(metrics)
            if rank == 0:
                _checkpoint(
                    scratch, progress, segmenter, joint, best, optimiser, schedule, scaler, average
                )
                on_epoch(metrics, progress.epoch)
    segmenter.load_trained(best)
    return progress


def _bar(title: str, *, shown: bool) -> Any:
    """A progress bar whose task has a field `words`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn(title),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
        disable=not shown,
    )


class Average:
    """A running average of the trained weights (Polyak & Juditsky 1992; exponential, as in Tarvainen & Valpola 2017).

    Args:
        keep: share that the average keeps at each step; less in the first ones, (1 + steps) / (10 + steps), so that initial
            values are soon forgotten. 0: the weights themselves.
        state: to go on from.
    """

    def __init__(self, keep: float, state: State) -> None:
        self.keep, self.state = keep, state if keep else {}

    def step(self, segmenter: Segmenter, steps: int) -> None:
        """Take in the weights after `steps` steps."""
        if not self.keep:
            return
        keep = min(self.keep, (1 + steps) / (10 + steps))
        for name, value in segmenter.live_state().items():
            own = self.state[name] = self.state[name].to(value.device)
            if value.is_floating_point():
                own.lerp_(value, 1 - keep)
            else:
                own.copy_(value)

    @contextmanager
    def in_place(self, segmenter: Segmenter) -> Iterator[None]:
        """The average in the place of the weights."""
        if not self.keep:
            yield
            return
        now = _copy(segmenter)
        segmenter.load_trained(self.state)
        yield
        segmenter.load_trained(now)


def _copy(segmenter: Segmenter) -> State:
    return {k: v.clone() for k, v in segmenter.trained_state().items()}


def _step(
    loss: float,
    joint: Plain,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    train: TrainSettings,
) -> float:
    """One optimiser step with the gradients that are there; `loss`: of this process's part of the batch, returned for all."""
    parameters = [p for g in optimiser.param_groups for p in g["params"]]
    total = parallel.add_up(parameters, loss)
    scaler.unscale_(optimiser)
    for some in joint.clipped(parameters):
        torch.nn.utils.clip_grad_norm_(some, train.clip)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return total


def val_slices(volume: Volume, every: int, depth: int = 0) -> list[int]:
    """`every` validation slices spread over the block, or all of them for 0.

    For a model in 3D neighbours from the middle of the block: `every`, and at least the `depth` of its patch.
    """
    slices = volume.split["val"]
    if every and depth:
        n = min(max(every, depth), len(slices))
        first = (len(slices) - n) // 2
        return slices[first : first + n]
    if every and len(slices) > every:
        return [slices[round(k)] for k in np.linspace(0, len(slices) - 1, every)]
    return slices


def score(
    segmenter: Segmenter,
    volumes: list[Volume],
    views: list[list[TokenView]],
    every: int,
    loss_of: nn.Module | None = None,
) -> dict[str, float]:
    """Foreground IoU on validation slices, the mean over the datasets of the union.

    With `loss_of`, the mean loss as well.
    """
    segmenter.eval()
    in_3d = segmenter.regime.is_3d
    ious, losses = [], []
    for i, volume in enumerate(volumes):
        slices = val_slices(volume, every, segmenter.regime.patch[0] if in_3d else 0)
        overlap = 0.0 if every else None  # quick while training, as in evaluation at the end
        counts = torch.zeros(
            (len(slices), 3), dtype=torch.float64
        )  # pixels hit, pixels in either, loss
        mine = range(parallel.rank(), len(slices), parallel.size())
        shown = (
            mine if every else range(len(slices))
        )  # slices spread over the block have no neighbours to be smoothed with
        shown = range(len(slices)) if in_3d else shown if segmenter.spec.smooth_z_nm else mine
        predicted = predict_slices(
            segmenter,
            volume,
            [slices[k] for k in shown],
            views[i][0] if views else None,
            overlap,
            averaged=not every,
        )
        for k, (z, probability) in zip(shown, predicted, strict=True):
            if k not in mine:
                continue
            label, found = volume.label[z] > 0, probability > 0.5
            counts[k, 0], counts[k, 1] = int((label & found).sum()), int((label | found).sum())
            if loss_of is not None:
                p = torch.tensor(probability).clamp(1e-6, 1 - 1e-6)
                logits = torch.stack([(1 - p).log(), p.log()])[
                    None
                ]  # softmax gives back the probabilities
                counts[k, 2] = float(
                    loss_of(logits, torch.from_numpy(np.array(volume.label[z]))[None, None].long())
                )
        counts = parallel.total(counts)  # each slice from the one process that has it
        hits, total, _ = counts.sum(0).tolist()
        ious.append(hits / total if total else 1.0)
        if loss_of is not None:
            losses += counts[:, 2].tolist()
    scored = {
        "iou": float(np.mean(ious)),
        **{f"iou.{v.name}": iou for v, iou in zip(volumes, ious, strict=True)},
    }
    return scored | ({"loss": float(np.mean(losses))} if losses else {})


def _optimiser(
    segmenter: Segmenter, train: TrainSettings, joint: Plain | None = None
) -> torch.optim.Optimizer:
    head = {
        "params": list(segmenter.head.parameters()),
        "lr": train.head_lr,
        "weight_decay": train.weight_decay,
    }
    beside = (
        [{**head, "params": own}] if joint and (own := list(joint.modules.parameters())) else []
    )
    adapter = parameter_groups(
        segmenter.backbone, segmenter.regime, train.adapter_lr, train.weight_decay
    )
    return torch.optim.AdamW([head, *adapter, *beside])


def rate_factor(train: TrainSettings, steps: int) -> Callable[[int], float]:
    """Factor on the learning rates at a step: linear warm-up, then cosine to 1 % or constant."""
    total = max(1, train.epochs * steps - train.warmup_steps)

    def factor(step: int) -> float:
        if step < train.warmup_steps:
            return (step + 1) / train.warmup_steps
        if train.schedule == "constant":
            return 1.0
        return 0.01 + 0.99 * 0.5 * (
            1 + math.cos(math.pi * min(1.0, (step - train.warmup_steps) / total))
        )

    return factor


def stalled(progress: Progress, train: TrainSettings) -> bool:
    """Whether patience is over."""
    return bool(train.patience) and progress.epoch - 1 - progress.best_epoch >= train.patience


def digest_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, without the correlation that adding them would bring."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _checkpoint(
    scratch: Path,
    progress: Progress,
    segmenter: Segmenter,
    joint: Plain,
    best: State,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    scaler: torch.amp.GradScaler,
    average: Average,
) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    state = {
        "progress": vars(progress),
        "trained": segmenter.trained_state(),
        "best": best,
        "joint": joint.modules.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": schedule.last_epoch,
        "scaler": scaler.state_dict(),
        "average": {k: v.cpu() for k, v in average.state.items()},
    }
    temporary = scratch / ".checkpoint.part"
    torch.save(state, temporary)
    temporary.replace(scratch / "checkpoint.pt")


def _resume(
    scratch: Path,
    segmenter: Segmenter,
    joint: Plain,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    scaler: torch.amp.GradScaler,
    keep: float,
) -> tuple[Progress, State, Average]:
    path = scratch / "checkpoint.pt"
    if not path.is_file():
        return Progress(), segmenter.trained_state(), Average(keep, _copy(segmenter))
    state = torch.load(path, weights_only=True, map_location="cpu")
    segmenter.load_trained(state["trained"])
    joint.modules.load_state_dict(state.get("joint", {}))
    optimiser.load_state_dict(state["optimiser"])
    scaler.load_state_dict(state.get("scaler", {}))
    schedule.last_epoch = state["step"]
    for group, rate, factor in zip(
        optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(state["step"])
    return Progress(**state["progress"]), state["best"], Average(keep, state.get("average", {}))
