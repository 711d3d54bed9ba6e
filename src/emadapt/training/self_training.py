"""Self-training: images without labels are learned from what a mean teacher says of them.

The teacher is the moving average of the student (Tarvainen & Valpola 2017, arXiv 1703.01780). It
sees an image whole. The student sees it twice with blocks masked, what the one view hides being
what the other shows, and must give the teacher's answer (MaskTwins, Wang et al. 2025; masked
consistency is Hoyer et al. 2023, arXiv 2212.01322). No label of these images is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from emadapt.data.batches import Draw, Item, cycle, members_of
from emadapt.data.foreground import IGNORE
from emadapt.models.device import autocast, device
from emadapt.models.segmenter import IMAGE_CHANNELS
from emadapt.study.regimes import GradientRegime
from emadapt.training.objective import Objective

ALONE = 0.4
"""Share of the epochs on labels alone, of a model that starts from random values."""
BLOCK = 3
"""Side of a masked block, in patches."""
SURE = 0.9
"""Probability from which the teacher's answer is a label."""
DRAWN = 2.0
"""Factor, at most, by which odds of a class are changed so that its shares agree."""
EPSILON = 1e-4
FAR = 2.0
"""Factor by which the predicted foreground may change before a warning."""
LEAST = 0.001
"""Share of foreground below which a model finds nothing."""
NEAR_NM = 15.0
"""Sections that are no farther apart show the same objects in the same places."""


class SelfTraining(Objective):
    """The loss of labelled samples, and that of disagreeing with the teacher on the others."""

    def __init__(self, settings: GradientRegime, *given: Any) -> None:
        super().__init__(*given)
        self.weight, self.n_labelled = settings.self_training, len(self.inputs.volumes)
        self.first = 0 if settings.warm_start else int(ALONE * self.inputs.train.epochs)
        self.average.forgets = not settings.warm_start

    def plan(self, plan: list[list[Draw]], epoch: int) -> list[list[Draw]]:
        """Add as many draws of unlabelled images as a batch has of labelled ones.

        After each comes the same place of a neighbouring section, or itself where that is far.
        """
        if epoch < self.first:
            return plan
        samples, volumes = self.inputs.samples, self.inputs.unlabelled
        each = max(1, self.inputs.train.batch // len(volumes))
        rng = np.random.default_rng([self.inputs.unit.seed, epoch, 1])  # `plan_epoch`: without 1
        extra: list[list[Draw]] = [[] for _ in plan]
        for number, (volume, rows) in enumerate(
            zip(volumes, samples.unlabelled_rows(), strict=True), self.n_labelled
        ):
            near = float(volume.manifest["voxel_nm"][0]) <= NEAR_NM
            chosen = cycle(rows, each * len(plan), rng)
            seeds = rng.integers(2**31, size=len(chosen))
            for i, (row, seed) in enumerate(zip(chosen, seeds, strict=True)):
                draw = Draw(number, int(row), int(seed))
                step = int(rng.choice([-1, 1])) if near else 0
                extra[i // each] += [draw, samples.beside(draw, step)]
        return [batch + more for batch, more in zip(plan, extra, strict=True)]

    def backward(self, batch: list[Item], draws: list[Draw], n: int) -> torch.Tensor:
        known: list[Item] = []
        groups = zip(batch, members_of(self.inputs.samples, draws), strict=True)
        for (inputs, labels), members in groups:
            inputs, labels = (part.to(device(), non_blocking=True) for part in (inputs, labels))
            n_known = sum(member < self.n_labelled for member in members)  # they come first
            if n_known:
                ours = labels[:n_known]
                known.append((inputs[:n_known], ours))
                self._note("labelled", (ours > 0) & (ours != IGNORE))
                ids = range(1, 1 + len(self.segmenter.classes))
                self._moving("labelled", [ours == own for own in ids])
            if n_known < len(members):
                loss = self._disagreement(inputs[n_known:], labels.shape[-2:])
                self.scaler.scale(self.weight * loss).backward()
        return super().backward(known, draws, n)

    def _disagreement(self, images: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Of the student, who sees a half of each image, and the other half of the one beside it.

        Both in another light, where images are shown and not their cached tokens.
        """
        image, beside = images[0::2], images[1::2]
        with torch.no_grad(), self.average.in_place(self.segmenter), autocast(self.precision):
            taught = self.segmenter.eval()(image, size).float().softmax(1)
        self.segmenter.train()
        labels = self._labels(taught[:, 1:])
        of_pixels = images.shape[1] in IMAGE_CHANNELS
        shown = blocks(image, BLOCK * (self.segmenter.patch if of_pixels else 1))
        views = [masked(image, shown), masked(beside, ~shown)]
        if of_pixels:
            views = [in_other_light(view) for view in views]
        with autocast(self.precision):
            logits = self.segmenter(torch.cat(views), size)
        both = torch.cat([labels, labels])
        total = F.cross_entropy(logits, both, ignore_index=IGNORE, reduction="sum")
        return total / both.numel()

    def _labels(self, taught: torch.Tensor) -> torch.Tensor:
        """Labels from the teacher's (B, classes, ...) probabilities, `IGNORE` where it is not sure.

        The mean probability of a class is drawn to its share among the labels, by at most `DRAWN`
        (distribution alignment, Berthelot et al. 2020, arXiv 1911.09785): a teacher that is sure of
        the background alone would teach the student to miss objects, and one that finds too many
        would find ever more.
        """
        self._note("unlabelled", taught.sum(1) > 0.5)
        found = self._moving("unlabelled", taught.unbind(1))
        wanted = self.state.get("labelled", found)
        odds = (wanted / found) * (1 - found.sum()) / (1 - wanted.sum()).clamp_min(EPSILON)
        odds = odds.clamp(1 / DRAWN, DRAWN).float().view(-1, *[1] * (taught.dim() - 2))
        weighed = taught * odds
        drawn = weighed / (weighed.sum(1, keepdim=True) + 1 - taught.sum(1, keepdim=True))
        background = 1 - drawn.sum(1, keepdim=True)
        sure, labels = torch.cat([background, drawn], 1).max(1)
        labels[sure < SURE] = IGNORE
        return labels

    def _moving(self, which: str, classes: Iterable[torch.Tensor]) -> torch.Tensor:
        """A moving average of each class's share, on the device, which checkpoints keep."""
        now = torch.stack([own.float().mean() for own in classes]).double().clamp_min(EPSILON)
        self.state[which] = 0.98 * self.state.get(which, now) + 0.02 * now
        return self.state[which]

    def _note(self, which: str, foreground: torch.Tensor) -> None:
        """Keep the share of foreground, and twice its area by its outline: the width of stripes."""
        edges = [foreground.diff(dim=axis).sum() for axis in (-2, -1)]
        width = 2 * foreground.sum() / torch.stack(edges).sum().clamp_min(1)
        self.note(**{f"{which}_share": foreground.float().mean(), f"{which}_width": width})


def blocks(images: torch.Tensor, side: int) -> torch.Tensor:
    """Which half of each image is shown, (B, 1, h, w) bool, in blocks of `side`; drawn by torch."""
    grid = [math.ceil(length / side) for length in images.shape[2:]]
    drawn = torch.rand(len(images), 1, *grid, device=images.device)
    shown = drawn < drawn.flatten(1).median(1).values.view(-1, *[1] * (drawn.dim() - 1))
    for axis, length in enumerate(images.shape[2:], 2):
        shown = shown.repeat_interleave(side, axis).narrow(axis, 0, length)
    return shown


def masked(images: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Images or tokens (B, C, h, w), with the mean of each channel where they are not shown."""
    values = images.float()
    return torch.where(shown, values, values.mean(tuple(range(2, values.dim())), keepdim=True))


def in_other_light(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, h, w) in [0, 1] with another contrast and brightness each."""
    contrast, brightness = torch.rand(2, len(images), *[1] * (images.dim() - 1)).to(images.device)
    return (images * (0.75 + 0.5 * contrast) + 0.3 * (brightness - 0.5)).clamp(0, 1)


def verdict(history: Sequence[Mapping[str, float]]) -> str:
    """What is odd about the foreground of images without labels, in a sentence; empty: nothing is.

    No label is needed: the share of foreground and the width of its objects are compared with those
    at the start of self-training, and the width with that of the labels.

    Args:
        history: metrics of each epoch.
    """
    epochs = [epoch for epoch in history if "train/unlabelled_share" in epoch]
    if not epochs:
        return ""
    share, width = (epochs[-1][f"train/unlabelled_{name}"] for name in ("share", "width"))
    before, labelled = epochs[0]["train/unlabelled_share"], epochs[-1]["train/labelled_width"]
    if share < LEAST:
        return f"it finds almost nothing ({share:.2%} foreground)"
    if not 1 / FAR < share / max(before, LEAST) < FAR:
        return f"its foreground went from {before:.1%} to {share:.1%} while it taught itself"
    if labelled and not 1 / FAR < width / labelled < FAR:
        return f"its objects are about {width:.0f} pixels wide, in the labels {labelled:.0f}"
    return ""
