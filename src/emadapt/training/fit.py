"""Fit a model in steps. On a CPU the same inputs give the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from emadapt.data.batches import deal, load_epoch, plan_epoch, with_absent
from emadapt.errors import EmadaptError, first_line
from emadapt.models import parallel
from emadapt.models.adapters import Groups, State
from emadapt.models.device import device
from emadapt.models.parallel import BatchNorm
from emadapt.progress import progress_bar
from emadapt.study.training import TrainSettings
from emadapt.training.average import Average, copy_of
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.objective import LOSSES, Objective
from emadapt.training.validate import validate

CHECKPOINT = "checkpoint.pt"
READ = 16
"""A loss is shown every so many steps: reading it waits until the GPU has done what is queued."""


def fit(
    inputs: Inputs,
    scratch: Path,
    on_epoch: OnEpoch,
    groups: Groups,
    make_objective: Callable[..., Objective],
) -> Progress:
    """Train from the last checkpoint on; leaves the best epoch's weights in the segmenter.

    `on_epoch` is called when the checkpoint of an epoch is written, in the first of several
    processes. `groups` gives an optimiser's groups for what is trained of the backbone.

    Raises:
        EmadaptError: the loss is not finite, processes see different checkpoints, or the GPU's
            memory is too small.
    """
    run = Run(inputs, scratch, groups, make_objective)
    train, progress = inputs.train, run.progress
    if not parallel.agree(progress.epoch):
        raise EmadaptError(
            f"unit {inputs.unit.name}: its processes see different checkpoints; "
            f"{scratch} must be one folder for all"
        )
    title, shown = f"train {inputs.unit.name}", parallel.rank() == 0
    total, done = (epochs * run.steps for epochs in (train.epochs, progress.epoch))
    with progress_bar(title, total, done, shown=shown) as advance:
        while progress.epoch < train.epochs and not stalled(progress, train):
            started = time.perf_counter()
            losses: list[torch.Tensor] = []
            said = ""
            try:
                for loss in run.epoch():
                    if len(losses) % READ == 0:
                        said = f"loss {float(loss):.3f}, best {max(progress.best, 0):.3f}"
                    losses.append(loss)
                    advance(1, said)
            except torch.OutOfMemoryError as error:
                raise too_large(inputs, error) from error
            metrics = run.validated(losses)
            progress.epoch += 1
            progress.seconds += time.perf_counter() - started
            progress.history.append(metrics)
            if parallel.rank() == 0:
                run.save(scratch)
                on_epoch(metrics, progress.epoch)
    inputs.segmenter.load_trained(run.best)
    return progress


class Run:
    """A training under way: what a checkpoint holds, and what an epoch does to it."""

    def __init__(
        self,
        inputs: Inputs,
        scratch: Path,
        groups: Groups,
        make_objective: Callable[..., Objective],
    ) -> None:
        self.inputs, self.train, self.segmenter = inputs, inputs.train, inputs.segmenter
        self.rows = inputs.samples.rows()
        self.steps = len(plan_epoch(self.rows, self.train, inputs.unit.seed, 0))
        self.loss_of = LOSSES[self.train.loss]
        fp16 = self.train.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device().type, enabled=fp16)
        self.average = Average(self.train.ema, copy_of(self.segmenter))
        self.objective = make_objective(inputs, self.loss_of, self.scaler, self.average)
        self.optimiser = optimiser(inputs, groups)
        self.schedule = LambdaLR(self.optimiser, rate_factor(self.train, self.steps))
        self.progress = Progress()
        self.best: State = self.segmenter.trained_state()
        if (path := scratch / CHECKPOINT).is_file():
            self._resume(path)

    def epoch(self) -> Iterator[torch.Tensor]:
        """Yields the loss of each step."""
        number, seed = self.progress.epoch, self.inputs.unit.seed
        rank, size = parallel.rank(), parallel.size()
        # Dropout: the same after a resume, another one in each process.
        torch.manual_seed(digest_seed(seed, number, *([rank] if rank else [])))
        self.segmenter.train()
        samples, plan = self.inputs.samples, plan_epoch(self.rows, self.train, seed, number)
        if size > 1:
            own = [deal(samples, whole, rank, size) for whole in plan]
        else:
            own = self.objective.plan(plan, number)
        shared = size > 1 and any(isinstance(m, BatchNorm) for m in self.segmenter.modules())
        batches = load_epoch(samples, own, self.train.workers)
        for whole, draws, batch in zip(plan, own, batches, strict=True):
            groups = with_absent(samples, whole, batch) if shared else batch
            yield self._step(self.objective.backward(groups, draws, len(whole)))

    def _step(self, loss: torch.Tensor) -> torch.Tensor:
        """One optimiser step, given this process's part of the loss; gives the whole loss."""
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        total = parallel.add_up(parameters, loss)
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(parameters, self.train.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        self.average.step(self.segmenter, self.schedule.last_epoch)
        return total

    def validated(self, steps: list[torch.Tensor]) -> dict[str, float]:
        """Metrics of an epoch with these losses. The best weights so far are kept."""
        losses = torch.stack(steps).tolist()
        if not math.isfinite(sum(losses)):
            where = f"unit {self.inputs.unit.name}, epoch {self.progress.epoch}"
            raise EmadaptError(f"{where}: the loss is not finite; lower head_lr or adapter_lr")
        with self.average.in_place(self.segmenter):
            scored = validate(self.inputs, self.train.val_slices, self.loss_of)
            candidate = copy_of(self.segmenter)
        groups = ["head", "adapter"] if self.segmenter.trainable()["adapter"] else ["head"]
        rates = zip(groups, self.schedule.get_last_lr(), strict=False)
        metrics = {
            "train/loss": float(np.mean(losses)),
            **{f"train/lr_{group}": float(rate) for group, rate in rates},
            **self.objective.metrics(),
            f"val/{self.segmenter.score}": scored[self.segmenter.score],
            "val/loss": scored["loss"],
        }
        monitor = self.train.monitor
        value = -metrics["val/loss"] if monitor == "val_loss" else scored[self.segmenter.score]
        if monitor == "last" or value > self.progress.best:
            self.progress.best, self.progress.best_epoch = value, self.progress.epoch
            self.best = candidate
        return metrics

    def save(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        state = {
            "progress": vars(self.progress),
            "trained": self.segmenter.trained_state(),
            "best": self.best,
            "objective": self.objective.state,
            "optimiser": self.optimiser.state_dict(),
            "step": self.schedule.last_epoch,
            "scaler": self.scaler.state_dict(),
            "average": {k: v.cpu() for k, v in self.average.state.items()},
        }
        temporary = scratch / ".checkpoint.part"
        torch.save(state, temporary)
        temporary.replace(scratch / CHECKPOINT)

    def _resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.segmenter.load_trained(state["trained"])
        self.objective.resume(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.schedule.last_epoch = state["step"]
        self.progress, self.best = Progress(**state["progress"]), state["best"]
        self.average.state = state["average"]


def too_large(inputs: Inputs, error: torch.OutOfMemoryError) -> EmadaptError:
    """That a step needs more memory. It is not made smaller: another batch, another result."""
    return EmadaptError(
        f"unit {inputs.unit.name}: the GPU's memory is too small for a step ({first_line(error)}); "
        f"lower `batch`, which is {inputs.train.batch}, or `tile`, or set "
        "`gradient_checkpointing: true`; each but the last changes the result"
    )


def optimiser(inputs: Inputs, groups: Groups) -> torch.optim.Optimizer:
    """AdamW on the head and the adapter."""
    train, segmenter = inputs.train, inputs.segmenter
    own = {"lr": train.head_lr, "weight_decay": train.weight_decay}
    head = [{**own, "params": list(segmenter.head.parameters())}]
    adapter = []
    if segmenter.trainable()["adapter"]:
        adapter = groups(segmenter.backbone.network, train.adapter_lr, train.weight_decay)
    return torch.optim.AdamW([*head, *adapter])


def rate_factor(train: TrainSettings, steps: int) -> Callable[[int], float]:
    """Factor on the learning rates at a step: linear warm-up, then cosine to 1 % or constant."""
    total = max(1, train.epochs * steps - train.warmup_steps)

    def factor(step: int) -> float:
        if step < train.warmup_steps:
            return (step + 1) / train.warmup_steps
        if train.schedule == "constant":
            return 1.0
        done = min(1.0, (step - train.warmup_steps) / total)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def stalled(progress: Progress, train: TrainSettings) -> bool:
    """Whether patience is over."""
    return bool(train.patience) and progress.epoch - 1 - progress.best_epoch >= train.patience


def digest_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; sums of them would be correlated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
