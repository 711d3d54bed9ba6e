"""Start the processes that train one unit on several devices, watch over them, and end them all together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from emadapt.errors import EmadaptError, InputError

POLL = 0.1  # s between looks at the processes
GRACE = 5.0  # s that the others get to fail by themselves, with words of their own
PATIENCE = 10.0  # s between asking a process to end and ending it
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse_devices(text: str) -> list[str]:
    """`0,1` -> ["0", "1"]: numbers of GPUs, or `cpu` as often as wanted.

    Raises:
        InputError: something else.
    """
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    gpus = [name for name in names if name != "cpu"]
    if (
        (gpus and len(gpus) < len(names))
        or len(set(gpus)) < len(gpus)
        or not all(name.isdigit() for name in gpus)
    ):
        raise InputError(
            f"devices {text!r}",
            found="a list that cannot be used",
            expected="GPU numbers, each once, or cpu,cpu",
            do="Write e.g. 0,1; `nvidia-smi` lists the numbers.",
        )
    return names


def visible(devices: Sequence[str]) -> dict[str, str]:
    """Environment in which a process sees these devices and no others; it must be there before torch is imported."""
    gpus = ",".join(name for name in devices if name != "cpu")
    return {
        "CUDA_VISIBLE_DEVICES": gpus,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # in the order of nvidia-smi


def wants_gpus(text: str) -> bool:
    """Whether a list of devices names GPUs."""
    return bool(visible(parse_devices(text))["CUDA_VISIBLE_DEVICES"])


def is_one_of_several() -> bool:
    """Whether this process was started together with others: by `launch`, `accelerate launch` or torchrun."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def die_with(parent: int) -> None:
    """Be killed by the kernel when the parent dies, however it dies, so that nothing is left behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before that
        sys.exit(1)


def launch(command: Sequence[str], devices: Sequence[str], logs: Path) -> None:
    """Run `command` once per device, together; returns when all have ended well.

    Args:
        command: of each process.
        devices: of `parse_devices`, at least two.
        logs: folder for the output of all but the first, whose output is shown.

    Raises:
        EmadaptError: one of them ended badly; none is left.
        KeyboardInterrupt: told to stop; none is left.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with stoppable(), _ended([]) as processes:
        port = _free_port()
        for number in range(len(devices)):
            log = None if number == 0 else (logs / f"process-{number}.log").open("wb")
            processes.append(
                subprocess.Popen(
                    command,
                    env=_environment(devices, number, port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log and subprocess.STDOUT,
                )
            )
            if log:
                log.close()
        while not (failed := [i for i, p in enumerate(processes) if p.poll()]):
            if all(p.poll() == 0 for p in processes):
                return
            time.sleep(POLL)
        deadline = time.monotonic() + GRACE
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(POLL)
    if processes[0].returncode == 2:  # it has said what the matter is
        sys.exit(2)
    first = min(
        failed, key=lambda i: processes[i].returncode
    )  # killed ones before those that complain of it
    code = processes[first].returncode
    died = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise EmadaptError(
        f"process {first} of {len(devices)}, on device {devices[first]}, died ({died}), so all were ended"
        + (f"; {_tail(logs / f'process-{first}.log')}" if first else "")
    )


def _environment(devices: Sequence[str], number: int, port: int) -> dict[str, str]:
    """What torch.distributed and accelerate read; all processes see all devices, and take the one of their number."""
    n = str(len(devices))
    team = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "EMADAPT_LAUNCHER": str(os.getpid()),
    }
    cores = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    return os.environ | team | {"OMP_NUM_THREADS": str(max(1, cores // len(devices)))}


def _free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return int(here.getsockname()[1])


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").strip().splitlines()[-lines:]
    return (
        "\n".join([f"{log} ends with", *[f"    {line}" for line in text]])
        if text
        else f"nothing in {log}"
    )


@contextlib.contextmanager
def _ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """At the end, however it comes, every process is gone."""
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(POLL)
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """`kill`, and a terminal that is closed, end it as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {
        s: signal.signal(s, stop) for s in STOPS if signal.getsignal(s) != signal.SIG_IGN
    }  # nohup ignores one
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
