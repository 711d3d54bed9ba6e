"""Batch normalisation over all processes that train a unit together."""

from __future__ import annotations

import torch
from torch import nn

from emadapt.models import parallel


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015) over the samples of all processes, in 2D or 3D.

    Unlike torch's SyncBatchNorm it runs on a CPU too, and where a process has no sample, so tests
    see what GPUs do.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or parallel.size() == 1:
            return super().forward(x)
        values = x.float()
        count = values.new_full((1,), values.numel() // values.shape[1])
        places, axes = (-1, *[1] * (x.dim() - 2)), (0, *range(2, x.dim()))
        sums = parallel.Total.apply(torch.cat([values.sum(axes), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = values - mean.view(places)
        variance = parallel.Total.apply(centred.square().sum(axes)) / n
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
