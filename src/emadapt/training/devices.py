"""One unit on several devices: torchrun starts the processes, accelerate joins them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta

from emadapt.errors import EmadaptError, InputError

TIMEOUT = timedelta(minutes=10)
"""After which a process gives up waiting for the others."""
DEVICES, LAUNCHER = "EMADAPT_DEVICES", "EMADAPT_LAUNCHER"
USER_ERROR = 2  # exit code of a process that has printed an error for the user


def parse_devices(text: str) -> list[str]:
    """`0,1` -> ["0", "1"]: GPUs by number or UUID (of a MIG part, too), or `cpu`s.

    Raises:
        InputError: something else.
    """
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    gpus = [name for name in names if name != "cpu"]
    mixed = bool(gpus) and len(gpus) < len(names)
    known = all(name.isdigit() or name.startswith(("GPU-", "MIG-")) for name in gpus)
    if mixed or len(set(gpus)) < len(gpus) or not known:
        raise InputError(
            f"devices {text!r}",
            found="a list that cannot be used",
            expected="numbers or UUIDs of GPUs, each once, or cpu,cpu",
            do="Write e.g. 0,1; `nvidia-smi -L` lists them.",
        )
    return names


def visible(devices: Sequence[str]) -> dict[str, str]:
    """Environment in which a process sees only these devices. Set it before importing torch."""
    gpus = ",".join(name for name in devices if name != "cpu")
    return {"CUDA_VISIBLE_DEVICES": gpus, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # as nvidia-smi counts


def share_of_cores(processes: int) -> dict[str, str]:
    """Environment of one of some processes at work together; a single one is left as it is.

    They share OMP_NUM_THREADS, of nested levels ("4,2") the first, else the cores that are allowed.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cores = int(said) if said.isdigit() else len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))} if processes > 1 else {}


def is_one_of_several() -> bool:
    """Whether torchrun or `accelerate launch` started this process with others."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before that
        sys.exit(1)


def launch(arguments: Sequence[str], devices: Sequence[str]) -> None:
    """Run `emadapt ARGUMENTS` once per device, together; the output of the first process is shown.

    torchrun ends all processes when one dies, or when it is told to stop.

    Raises:
        EmadaptError: a process died.
        SystemExit: a process ended with an error that it has printed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ |= share_of_cores(len(devices))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        run_id=str(os.getpid()),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(devices),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(local_ranks_filter={0}),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "emadapt", *arguments)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:
            sys.exit(USER_ERROR)
        raise EmadaptError(
            f"process {rank} of {len(devices)}, on device {devices[rank]}, died "
            f"(exit code {failure.exitcode}), so all were ended"
        ) from error


def join() -> None:
    """Meet the other processes of this unit, if there are any.

    Raises:
        InputError: there are fewer GPUs than processes, or than were asked for.
    """
    import torch

    several, asked = is_one_of_several(), os.environ.get(DEVICES, "")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if several else 1
    wants_gpus = any(name != "cpu" for name in parse_devices(asked))
    gpus = torch.cuda.device_count()
    if gpus < here and (gpus or wants_gpus):
        raise InputError(
            f"devices {asked}" if asked else f"{here} processes",
            found=f"{gpus} GPUs that work",
            expected=f"{here}",
            do="Name those that `nvidia-smi -L` lists.",
        )
    if several:
        die_with(int(os.environ.get(LAUNCHER, os.getppid())))
        from accelerate import PartialState
        from accelerate.utils import check_cuda_p2p_ib_support

        if gpus and not check_cuda_p2p_ib_support():  # RTX 40: accelerate asks for these
            os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        PartialState(cpu=not gpus, timeout=TIMEOUT)  # gloo, or NCCL with one GPU for each


def leave() -> None:
    """Part from the others, all at about the same time."""
    import torch.distributed as dist

    if dist.is_initialized():
        from accelerate import PartialState

        PartialState().destroy_process_group()
