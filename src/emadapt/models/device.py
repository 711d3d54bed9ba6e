"""Where the arithmetic happens and how precise it is."""

from __future__ import annotations

import resource

import torch

from emadapt.errors import InputError


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_mb() -> float:
    """Most memory so far in MB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def free_bytes() -> int:
    """Free memory of the GPU; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the hardware multiplies in it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "fp32" if emulated("bf16") else "bf16"


def emulated(precision: str) -> bool:
    """Whether this CPU emulates products in `precision`, up to a hundred times slower.

    bf16 takes AVX-512 BF16 or AMX, fp16 AVX-512 FP16.
    """
    native = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return precision in native and not torch.cuda.is_available() and not native[precision]()


def check_precision(precision: str, what: str) -> None:
    """Refuse arithmetic that would take days, before it begins: for convolutions in 3D.

    Raises:
        InputError: `precision`, which `what` names, is emulated here.
    """
    if emulated(precision):
        raise InputError(
            what,
            found=f"{precision} without a GPU, on a CPU that emulates it, many times slower",
            expected="auto or fp32 for training in 3D",
            do="Set auto: bf16 where the hardware has it, else fp32.",
        )


def autocast(precision: str) -> torch.autocast:
    """Context that runs products and convolutions in `precision` (auto, bf16, fp16, fp32)."""
    resolved = resolve_precision(precision)
    dtype = torch.float16 if resolved == "fp16" else torch.bfloat16
    return torch.autocast(device().type, dtype=dtype, enabled=resolved != "fp32")
