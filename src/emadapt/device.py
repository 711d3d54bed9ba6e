"""Where the arithmetic happens and how precise it is."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the hardware multiplies in it, else fp32.

    On a CPU without AVX-512 BF16 or AMX a bf16 product is emulated, about a hundred times slower than fp32.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def autocast(precision: str) -> torch.autocast:
    """Context that runs matrix products and convolutions in `precision` (auto, bf16, fp16, fp32)."""
    resolved = resolve_precision(precision)
    dtype = torch.float16 if resolved == "fp16" else torch.bfloat16
    return torch.autocast(device().type, dtype=dtype, enabled=resolved != "fp32")
