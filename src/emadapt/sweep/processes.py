"""Signals that stop a sweep."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
