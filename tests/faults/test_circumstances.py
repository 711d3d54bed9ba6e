"""A clock that jumps, and the same work begun twice at once."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import pytest

from studies import VERBS, begin

pytestmark = pytest.mark.slow


def jumping(*words: str) -> None:
    """The verb while the clock is set forward a day and back a year all the time."""
    real, jumps = time.time, itertools.cycle([0.0, 86400.0, -365 * 86400.0, 3600.0])
    time.time = lambda: real() + next(jumps)
    if code := harness.emadapt(*words):
        raise SystemExit(code)


@pytest.mark.parametrize("verb", ["tokens", "train", "evaluate", "segment"])
def test_a_clock_that_jumps(verb: str, states: Path, tmp_path: Path) -> None:
    words, written = VERBS[verb]
    root = begin(states, verb, tmp_path / "root")
    ended = harness.run(root, *words, inside=jumping)
    assert ended.code == 0, ended.output
    assert harness.content(root, *written) == harness.content(states / f"after-{verb}", *written)


@pytest.mark.parametrize("verb", ["tokens", "train", "segment"])
def test_the_same_begun_twice_at_once(verb: str, states: Path, tmp_path: Path) -> None:
    """The second waits and finds it done, or is told that another one is at work."""
    words, written = VERBS[verb]
    root = begin(states, verb, tmp_path / "root")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: harness.run(root, *words), range(2)))
    codes = sorted(ended.code for ended in both)
    assert codes in ([0, 0], [0, 2]), [ended.output for ended in both]
    assert "Traceback" not in both[0].output + both[1].output
    assert harness.content(root, *written) == harness.content(states / f"after-{verb}", *written)
