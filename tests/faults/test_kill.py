"""A verb that is killed with signal 9, or begun twice at once, gives what it gives undisturbed."""

from concurrent.futures import ThreadPoolExecutor

import harness
import numpy as np
import pytest

from studies import VERBS, begin

pytestmark = pytest.mark.slow

KILLS = 4
"""Of each verb, at random moments."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_ends_as_an_undisturbed_one(verb, states, tmp_path):
    words, written = VERBS[verb]
    expected = harness.content(states / f"after-{verb}", *written)
    lasts = float((states / f"seconds-{verb}").read_text())
    rng = np.random.default_rng([7, list(VERBS).index(verb)])
    root, killed = begin(states, verb, tmp_path / "root"), 0
    while killed < KILLS:
        ended = harness.run(root, *words, kill_after=float(rng.uniform(0, lasts)))
        assert not ended.left, "orphans"
        assert ended.code in (0, -9), ended.output
        killed += ended.code == -9
        if killed in (3, KILLS) or ended.code == 0:
            last = harness.run(root, *words)
            assert last.code == 0, last.output
            assert harness.content(root, *written) == expected
            root = begin(states, verb, tmp_path / "root")


@pytest.mark.parametrize("verb", ["tokens", "train", "segment"])
def test_the_same_begun_twice_at_once(verb, states, tmp_path):
    """The second waits and finds it done, or is told that another one is at work."""
    words, written = VERBS[verb]
    root = begin(states, verb, tmp_path / "root")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: harness.run(root, *words), range(2)))
    codes = sorted(ended.code for ended in both)
    assert codes in ([0, 0], [0, 2]), [ended.output for ended in both]
    assert "Traceback" not in both[0].output + both[1].output
    assert harness.content(root, *written) == harness.content(states / f"after-{verb}", *written)
