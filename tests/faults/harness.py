"""Verbs in processes that are forked from one with torch loaded, so that many kills cost little."""

import contextlib
import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tifffile

VERBS = (
    *("cli", "data.ingest", "models.tokens", "training.train", "training.evaluate", "domains.run"),
    *("report.report", "pipeline.check", "segment.run"),
)
TIMES = {"seconds", "peak_mb", "train_seconds"}
"""What two runs of the same cannot have in common."""
LIMIT = 240.0
NUMBERS = itertools.count()
"""Of processes."""


class Ended(NamedTuple):
    """How a process ended: exit code, or minus the signal that ended it; its seconds; what it
    printed; processes of its session that are still there."""

    code: int
    seconds: float
    output: str
    left: list[int]


def context() -> Any:
    """Processes forked from a server that has loaded what verbs need, and started no thread."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        [f"emadapt.{name}" for name in VERBS] + ["mlflow", "matplotlib.pyplot", "harness"]
    )
    return server


def run(
    root: Path,
    *words: str,
    kill_after: float = LIMIT,
    inside: Callable[..., int] | None = None,
    **environment: str,
) -> Ended:
    """`emadapt WORDS` in `root`, or `inside` of it; killed with signal 9 after some seconds."""
    log = root.parent / f"{root.name}-{next(NUMBERS)}.log"
    given = (root, words, log, inside or emadapt, environment)
    process = context().Process(target=_child, args=given)
    process.start()
    ready = log.with_suffix(".ready")
    while not ready.exists() and process.is_alive():
        time.sleep(0.002)
    started = time.perf_counter()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    seconds = time.perf_counter() - started
    ready.unlink(missing_ok=True)
    for _ in range(100):  # what dies with its parent is given two seconds
        if not (left := of_session(process.pid)):
            break
        time.sleep(0.02)
    return Ended(process.exitcode, seconds, log.read_text() if log.exists() else "", left)


def _child(
    root: Path,
    words: tuple[str, ...],
    log: Path,
    call: Callable[..., int],
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.chdir(root)
    os.environ.update({"EMADAPT_TRACKING": "off", "FAULTS_LOG": str(log), **environment})
    with log.open("w") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    log.with_suffix(".ready").touch()
    code = 1
    try:
        code = call(*words)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def emadapt(*words: str) -> int:
    """The command line in this process; its exit code."""
    from emadapt.cli import main

    try:
        main(list(words), prog_name="emadapt")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def of_session(leader: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def content(root: Path, *patterns: str) -> dict[str, str]:
    """Sha256 of files but for temporary ones; of JSON without times and memory."""
    files = sorted(
        f for pattern in patterns for f in root.glob(pattern) if f.is_file() and f.name[0] != "."
    )
    return {str(f.relative_to(root)): _sha256(f) for f in files}


def _sha256(file: Path) -> str:
    raw = file.read_bytes()
    if file.suffix == ".tif":  # its description has the path of the volume that was segmented
        raw = tifffile.imread(file).tobytes()
    if file.suffix == ".json":
        raw = json.dumps(_timeless(json.loads(raw)), sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


@contextlib.contextmanager
def small_disk(at: Path, size: int) -> Iterator[Callable[..., None]]:
    """A file system of `size` bytes at a folder, for this process alone; gives a remount.

    Raises:
        PermissionError: this user may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(kind: str, flags: int, data: str) -> None:
        if libc.mount(kind.encode(), str(at).encode(), kind.encode(), flags, data.encode()):
            raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    if libc.unshare(0x00020000):  # a mount namespace of its own
        raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # Nothing mounted here is seen elsewhere.
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)
    mount("tmpfs", 0, f"size={size}")
    yield lambda mode: mount("tmpfs", 32 | (1 if mode == "ro" else 0), "")


def may_mount(folder: Path) -> bool:
    """Whether this user may have a small disk."""
    process = context().Process(target=_try_mount, args=(folder,))
    process.start()
    process.join()
    return bool(process.exitcode == 0)


def _try_mount(folder: Path) -> None:
    with small_disk(folder, 2**20):
        pass
