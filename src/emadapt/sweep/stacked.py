"""Many heads in one pass over cached tokens: reading, conversion, labels and validation slices are shared by all of them.

The heads are one set of tensors with a leading axis of members, and go through `torch.func.vmap` together. On a CPU
convolutions with stacked weights are slower than one after the other, so there the heads with convolutions take turns on
the shared batch; on a GPU, where small heads leave the device idle, they go together. Each member has its own learning
rate, weight decay, seed and gradient clipping, and ends where training it alone would have ended, up to rounding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from emadapt.models.device import autocast, device
from emadapt.models.heads import HEADS, Linear, Tokens
from emadapt.study.study import TrainSettings

State = dict[str, torch.Tensor]
Batch = list[tuple[torch.Tensor, torch.Tensor]]

BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim.AdamW's


class Stack:
    """Heads of one kind with their AdamW (Loshchilov and Hutter 2019), as tensors with a leading axis of members.

    Args:
        head: name in `HEADS`.
        dim: width of the tokens.
        n_blocks: how many blocks the head sees.
        settings: per member; all but `head_lr` and `weight_decay` must be the same.
        seeds: of the members' initial weights; the same weights as `Segmenter` gives them.

    Attributes:
        tensors: "params", "mean", "square" (AdamW's moments) and "buffers", each name -> (members, ...).
        steps: optimiser steps so far.
    """

    def __init__(
        self, head: str, dim: int, n_blocks: int, settings: list[TrainSettings], seeds: list[int]
    ) -> None:
        heads = []
        for seed in seeds:
            torch.manual_seed(seed)
            heads.append(HEADS[head](dim, n_blocks))
        self.dim, self.train, self.steps = dim, settings[0], 0
        self.frame = _Logits(heads[0]).to(device())
        # Linear's norm sees the tokens alone, so its statistics are those of all members: computed once.
        self.shared_norm = isinstance(heads[0], Linear)
        params = _stacked([dict(_Logits(h).named_parameters()) for h in heads])
        self.tensors: dict[str, State] = {
            "params": params,
            "mean": {k: torch.zeros_like(v) for k, v in params.items()},
            "square": {k: torch.zeros_like(v) for k, v in params.items()},
            "buffers": _stacked([dict(_Logits(h).named_buffers()) for h in heads]),
        }
        self.rates = torch.tensor([s.head_lr for s in settings], device=device())
        self.decays = torch.tensor([s.weight_decay for s in settings], device=device())

    def __len__(self) -> int:
        return len(self.rates)

    def step(self, batch: Batch, factor: float) -> torch.Tensor:
        """One optimiser step of every member.

        Args:
            batch: groups of equal shape: tokens (B, blocks * D, h, w) of any precision, labels (B, H, W).
            factor: on the learning rates.

        Returns:
            (members,) losses before the step.
        """
        self.frame.train()
        n = sum(len(labels) for _, labels in batch)
        losses = torch.zeros_like(self.rates)
        gradients = {k: torch.zeros_like(v) for k, v in self.tensors["params"].items()}
        for inputs, labels in batch:
            tokens, share = self._tokens(inputs), len(labels) / n
            truth = labels.to(device()).float()
            for part in self._parts():
                own = {
                    k: v[part].detach().requires_grad_() for k, v in self.tensors["params"].items()
                }
                with autocast(self.train.precision):
                    margin = self._margin(own, part, tokens)
                loss, gradient = self._loss(margin.detach().float(), truth)
                losses[part] += loss * share
                for k, g in zip(
                    own,
                    torch.autograd.grad(margin, list(own.values()), gradient * share),
                    strict=True,
                ):
                    gradients[k][part] += g
        self._update(gradients, factor)
        return losses

    @torch.inference_mode()
    def probabilities(
        self, inputs: torch.Tensor, size: tuple[int, int], precision: str
    ) -> torch.Tensor:
        """Foreground probabilities (members, B, H, W) of tokens (B, blocks * D, h, w)."""
        self.frame.eval()
        tokens = self._tokens(inputs)
        with autocast(precision):
            margins = [
                self._margin({k: v[p] for k, v in self.tensors["params"].items()}, p, tokens)
                for p in self._parts()
            ]
        margin = torch.cat(margins, 1).transpose(0, 1).float()
        rows, columns = (
            spread(a, b).to(margin) for a, b in zip(margin.shape[-2:], size, strict=True)
        )
        return (rows @ margin @ columns.T).sigmoid_()

    def keep(self, members: list[int]) -> None:
        """Go on with these members alone."""
        rows = torch.tensor(members, dtype=torch.long, device=device())
        shared = self.tensors["buffers"]
        self.tensors = {
            name: {k: v[rows].contiguous() for k, v in own.items()}
            for name, own in self.tensors.items()
        }
        if self.shared_norm:
            self.tensors["buffers"] = shared
        self.rates, self.decays = self.rates[rows], self.decays[rows]

    def state(self, member: int) -> dict[str, State]:
        """A copy of one member's tensors, on the CPU."""
        return {
            name: {k: self._row(name, v, member).to("cpu", copy=True) for k, v in own.items()}
            for name, own in self.tensors.items()
        }

    def load(self, member: int, state: dict[str, State], steps: int) -> None:
        """Put back what `state` gave. All members must be at the same step."""
        self.steps = steps
        for name, own in state.items():
            for k, v in own.items():
                self._row(name, self.tensors[name][k], member).copy_(v)

    def _row(self, name: str, tensor: torch.Tensor, member: int) -> torch.Tensor:
        return tensor[0 if name == "buffers" and self.shared_norm else member]

    def _tokens(self, inputs: torch.Tensor) -> Tokens:
        return list(inputs.to(device()).float().split(self.dim, 1))

    def _parts(self) -> list[slice]:
        """Which members go together."""
        if self.shared_norm or device().type == "cuda":
            return [slice(0, len(self))]
        return [slice(i, i + 1) for i in range(len(self))]

    def _margin(self, params: State, part: slice, tokens: Tokens) -> torch.Tensor:
        """Foreground logit minus background logit (B, members of the part, h, w): all that a softmax over two depends on."""
        buffers = {
            k: v[0] if self.shared_norm else v[part] for k, v in self.tensors["buffers"].items()
        }
        if part.stop - part.start == 1 and not self.shared_norm:
            alone = ({k: v[0] for k, v in own.items()} for own in (params, buffers))
            logits = functional_call(self.frame, tuple(alone), (tokens,))[None]
        else:
            call = vmap(
                lambda p, b: functional_call(self.frame, (p, b), (tokens,)),
                in_dims=(0, None if self.shared_norm else 0),
            )
            logits = call(params, buffers)  # members, B, 2, h, w
        return (logits[:, :, 1] - logits[:, :, 0]).transpose(0, 1)

    def _loss(self, margin: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (members,) at the labels' resolution, and their derivative by the margin (B, members, h, w).

        On a CPU an image at a time: what a member needs for one stays in the cache.
        """
        rows, columns = (
            spread(a, b).to(margin)
            for a, b in zip(margin.shape[-2:], truth.shape[-2:], strict=True)
        )
        losses, gradient = margin.new_zeros(margin.shape[1]), torch.empty_like(margin)
        for images in torch.arange(len(truth)).split(len(truth) if margin.is_cuda else 1):
            loss, own = loss_and_gradient(
                self.train.loss, rows @ margin[images] @ columns.T, truth[images]
            )
            losses += loss * (len(images) / len(truth))
            gradient[images] = rows.T @ own @ columns * (len(images) / len(truth))
        return losses, gradient

    @torch.no_grad()
    def _update(self, gradients: State, factor: float) -> None:
        self.steps += 1
        norm = sum(
            (g.flatten(1).square().sum(1) for g in gradients.values()), torch.zeros_like(self.rates)
        ).sqrt()
        clip = (self.train.clip / (norm + 1e-6)).clamp(max=1.0)
        first, second = 1 - BETAS[0] ** self.steps, 1 - BETAS[1] ** self.steps
        for k, p in self.tensors["params"].items():
            along = (-1, *[1] * (p.dim() - 1))
            rate, mean, square = (
                (self.rates * factor).view(along),
                self.tensors["mean"][k],
                self.tensors["square"][k],
            )
            gradient = gradients[k] * clip.view(along)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            p.mul_(1 - rate * self.decays.view(along))
            p.sub_(rate / first * mean / ((square / second).sqrt() + EPS))


class _Logits(nn.Module):
    """A head without its last step, under the names that a segmenter gives its tensors."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return torch.as_tensor(self.head.logits(tokens))  # type: ignore[operator]


@functools.cache
def spread(small: int, large: int) -> torch.Tensor:
    """Bilinear interpolation along one axis as a matrix (large, small): twice as fast here as `F.interpolate` and its inverse."""
    return F.interpolate(torch.eye(small)[None], large, mode="linear", align_corners=False)[
        0
    ].T.contiguous()


def _stacked(states: list[State]) -> State:
    return {k: torch.stack([s[k].detach() for s in states]).to(device()) for k in states[0]}


@torch.no_grad()
def loss_and_gradient(
    name: str, margin: torch.Tensor, truth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """MONAI's loss over both classes (see `emadapt.training.fit.loss_function`) per member, and its gradient.

    For two classes it depends on a pixel's margin alone, and its overlap terms on two sums an image: worth writing out,
    because for a small head the loss is most of the work.

    Args:
        name: dice_ce, dice or tversky.
        margin: (B, members, H, W) float32: foreground logit minus background logit.
        truth: (B, H, W) float32 of 0 and 1.

    Returns:
        (members,) losses, and (B, members, H, W), their derivative by the margin.
    """
    images, n = margin.shape[0], truth[0].numel()
    p, y = margin.sigmoid().flatten(2), truth.flatten(1)  # B,members,n and B,n
    with torch.enable_grad():
        found = p.sum(2).requires_grad_()  # B,members
        hit = torch.bmm(p, y[:, :, None])[..., 0].requires_grad_()
        loss = _region_loss(name, found, hit, y.sum(1)[:, None], n).mean(0)
        by_found, by_hit = torch.autograd.grad(loss.sum(), (found, hit))
    gradient = torch.addcmul(by_found[..., None], by_hit[..., None], y[:, None])
    gradient.mul_(p).mul_(1 - p)
    loss = loss.detach()
    if name == "dice_ce":
        gradient.add_(p - y[:, None], alpha=1 / (n * images))
        flat = margin.flatten(2)
        loss = loss + (F.softplus(flat).sum(2) - torch.bmm(flat, y[:, :, None])[..., 0]).mean(0) / n
    return loss, gradient.view_as(margin)


def _region_loss(
    name: str, found: torch.Tensor, hit: torch.Tensor, labelled: torch.Tensor, n: int
) -> torch.Tensor:
    """Dice or Tversky loss per image and member, the mean of foreground and background.

    Args:
        name: of the loss.
        found: sum of the foreground probabilities.
        hit: the same over labelled pixels.
        labelled: number of them.
        n: pixels of an image.
    """
    smooth = 1e-5
    misses, false = labelled - hit, found - hit
    both = (
        n - labelled - found + hit
    )  # the background's hits; its misses are the foreground's false alarms
    if name == "tversky":
        foreground = (hit + smooth) / (hit + 0.3 * false + 0.7 * misses + smooth)
        background = (both + smooth) / (both + 0.3 * misses + 0.7 * false + smooth)
    else:
        foreground = (2 * hit + smooth) / (found + labelled + smooth)
        background = (2 * both + smooth) / (2 * n - found - labelled + smooth)
    return 1 - (foreground + background) / 2
