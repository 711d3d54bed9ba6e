"""Where the arithmetic happens and how precise it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from emadapt.errors import EmadaptError, first_line


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_mb() -> float:
    """Most memory so far in MB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mb()


def peak_resident_mb() -> float:
    """Most resident memory in MB that this process has had.

    Not `ru_maxrss`: under Linux that begins with the memory of whoever started the process.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def free_bytes() -> int:
    """Free memory of the GPU; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


class Fitting:
    """Runs a model on batches, in halves of them once the GPU's memory was too small for more."""

    def __init__(self) -> None:
        self.most = sys.maxsize

    def __call__(
        self, run: Callable[[Any], Sequence[torch.Tensor]], batch: Any
    ) -> list[torch.Tensor]:
        """What `run` gives of a batch, or of its parts, joined.

        Raises:
            EmadaptError: the memory is too small for a single sample.
        """
        found, start = [], 0
        while start < len(batch):
            part = batch[start : start + self.most]
            try:
                found.append(run(part))
                start += len(part)
            except torch.OutOfMemoryError as error:
                self.most = len(part) // 2
                if not self.most:
                    raise EmadaptError(
                        f"the GPU's memory is too small for a single tile: {first_line(error)}; "
                        "end other work on it, or use the CPU: CUDA_VISIBLE_DEVICES= emadapt ..."
                    ) from error
                said = f"the GPU's memory is too small for {len(part)} tiles at once"
                print(f"{said}: {self.most} from now on", file=sys.stderr)
        return [torch.cat(parts) for parts in zip(*found, strict=True)]


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the hardware multiplies in it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    # Other CPUs emulate bf16, up to a hundred times slower.
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def autocast(precision: str) -> torch.autocast:
    """Context that runs products and convolutions in `precision` (auto, bf16, fp16, fp32)."""
    resolved = resolve_precision(precision)
    dtype = torch.float16 if resolved == "fp16" else torch.bfloat16
    return torch.autocast(device().type, dtype=dtype, enabled=resolved != "fp32")
