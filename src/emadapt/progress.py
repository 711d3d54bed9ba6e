"""How far long work is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

FIRST, EVERY = 10.0, 60.0
"""Seconds to the first line in a log, and between two."""

Item = TypeVar("Item")
Advance = Callable[..., None]
"""(Steps that were done, what to say beside the bar) -> None."""


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Advance]:
    """Show how much of `total` steps is done; yields what is called as steps are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console, began, first = Console(), time.monotonic(), done
    in_log, next_line = shown and not console.is_terminal, began + FIRST
    left, words = TimeRemainingColumn(elapsed_when_finished=True), "{task.fields[words]}"
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), left, words)
    with Progress(*columns, console=console, disable=in_log or not shown) as bar:
        task = bar.add_task(title, total=total, completed=done, words="")

        def advance(steps: int = 1, said: str = "") -> None:
            nonlocal done, next_line
            done += steps
            bar.update(task, completed=done, words=said)
            if in_log and (now := time.monotonic()) >= next_line and done > first:
                next_line = now + EVERY
                minutes = (now - began) / 60 * (total - done) / (done - first)
                line = f"{title}: {done} of {total}, {minutes:.1f} minutes left"
                print(f"{line}, {said}" if said else line, flush=True)

        yield advance


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The same items, with progress."""
    with progress_bar(title, total) as advance:
        for item in items:
            yield item
            advance()
