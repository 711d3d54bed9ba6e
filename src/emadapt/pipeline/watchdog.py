"""A process that ends the stages when `emadapt repro` ends, however it ends, kill -9 included.

It reads lines from a pipe: `+PID`, which a stage itself writes before it begins, and `-PID` when
it has ended. The end of the pipe is the end of `repro`: what is running then is told to stop, and
after `GRACE` seconds is killed. Each stage is a process group, so that DVC, the verb and its
workers end together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

GRACE = 5.0
POLL = 0.1
BEGIN = 'echo "+$$" >&0; exec "$@" </dev/null'
"""What a shell does to begin a stage, whose standard input is the pipe: so long as it has not said
that it is there, the pipe has no end."""


class Watchdog:
    """The process, as a context manager; the end waits until what still runs has ended."""

    def __enter__(self) -> Watchdog:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a signal to the group of `repro` does not reach it
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, command: Sequence[str], environment: Mapping[str, str], out: IO[str]) -> int:
        """Run a stage, a process group that ends with `repro`, its output to a file.

        Returns:
            Its exit status, less than 0 where a signal ended it.
        """
        child = subprocess.Popen(
            ["/bin/sh", "-c", BEGIN, "stage", *command],
            env=environment,
            stdin=self._process.stdin,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = child.wait()
        assert self._process.stdin is not None
        self._process.stdin.write(f"-{child.pid}\n")
        self._process.stdin.flush()
        return code

    def stop(self) -> None:
        """End all stages that are running, and wait for that."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()


def watch(lines: Iterable[str]) -> None:
    """Keep account of the groups that run; at the end of `lines` end them."""
    groups: set[int] = set()
    for line in lines:
        pid = int(line[1:])
        if line[0] == "+":
            groups.add(pid)
        else:
            groups.discard(pid)
    _signal(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while groups and time.monotonic() < deadline:
        time.sleep(POLL)
        groups = _signal(groups, 0)
    _signal(groups, signal.SIGKILL)


def _signal(groups: Iterable[int], number: int) -> set[int]:
    """Send a signal (0: none) to process groups; those that are there."""
    alive = set()
    for pid in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
            alive.add(pid)
    return alive


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watch(sys.stdin)
