"""Several processes train one unit, each on its own device: who they are, and what they add up.

Every process holds the same model and takes its part of each batch. Gradients, statistics of
normalisation and scores are summed over the processes, so all of them take the step that one
process would have taken with the whole batch, up to rounding. A process that is alone is not
changed by any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from emadapt.models.device import device


def rank() -> int:
    """Number of this process, from 0; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are; 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, the same bits in each of them; without gradient."""
    if size() == 1:
        return values
    summed = values.detach().to(device(), copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def agree(number: int) -> bool:
    """Whether it is the same in all processes."""
    return float(total(torch.tensor([number], dtype=torch.float64))) == number * size()


class Total(torch.autograd.Function):
    """`total` with its gradient, for sums that a model makes on its way."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return total(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return total(gradient)  # each process's part of the loss depends on what all of them put in


def add_up(parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    """Replace each gradient by its sum over the processes.

    One message for all of them, after the backward pass: heads and adapters are small, and unlike
    DDP it does not mind that processes have different numbers of samples, or none.

    Args:
        parameters: that are trained, in the same order everywhere.
        loss: this process's part.

    Returns:
        The sum of the parts.
    """
    if size() == 1:
        return loss
    graded = [p.grad is not None for p in parameters]
    has = torch.tensor(graded, dtype=torch.float32, device=device())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = [part.float().flatten() for part in parts]
    summed = total(torch.cat([has, *flat, loss.reshape(1)]))
    some, *sums, last = summed.split([len(has), *[p.numel() for p in parameters], 1])
    for parameter, one, values in zip(parameters, some.tolist(), sums, strict=True):
        # What no process has a gradient for stays without one: the optimiser then leaves it alone.
        parameter.grad = values.view_as(parameter).to(parameter.dtype) if one else None
    return last[0]


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015) over the samples of all processes, in 2D or 3D.

    Unlike torch's SyncBatchNorm it runs on a CPU too, and where a process has no sample, so tests
    see what GPUs do.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or size() == 1:
            return super().forward(x)
        values = x.float()
        count = values.new_full((1,), values.numel() // values.shape[1])
        places, axes = (-1, *[1] * (x.dim() - 2)), (0, *range(2, x.dim()))
        sums = Total.apply(torch.cat([values.sum(axes), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = values - mean.view(places)
        variance = Total.apply(centred.square().sum(axes)) / n
        with torch.no_grad():
            kept = dict(self.named_buffers())
            kept["running_mean"].lerp_(mean, self.momentum or 0.1)
            of_sample = variance * n / (n - 1)  # as torch keeps it
            kept["running_var"].lerp_(of_sample, self.momentum or 0.1)
            kept["num_batches_tracked"] += 1
        out = centred * (variance + self.eps).rsqrt().view(places)
        if self.affine:
            out = out * self.weight.view(places) + self.bias.view(places)
        return out.to(x.dtype)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Torch's check of the number of axes: any will do."""
