"""Killed with signal 9 and run again, every verb ends with what an undisturbed run gives."""

import os
from pathlib import Path

import harness
import numpy as np
import optuna
import pytest

from emadapt.sweep.storage import find_study, open_store
from studies import VERBS, begin

pytestmark = pytest.mark.slow

KILLS = 4
"""Of each verb, at random moments."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_ends_as_an_undisturbed_one(verb: str, states: Path, tmp_path: Path) -> None:
    words, written = VERBS[verb]
    expected, lasts = (
        harness.content(states / f"after-{verb}", *written),
        float((states / f"seconds-{verb}").read_text()),
    )
    rng = np.random.default_rng([7, list(VERBS).index(verb)])
    root, killed, whole = begin(states, verb, tmp_path / "root"), 0, 0
    while killed < KILLS:
        ended = harness.run(root, *words, kill_after=float(rng.uniform(0, lasts)))
        assert not ended.left, "orphans"
        assert ended.code in (0, -9), ended.output
        killed += ended.code == -9
        if killed % 3 == 0 or ended.code == 0:
            last = harness.run(root, *words)
            assert last.code == 0, last.output
            assert harness.content(root, *written) == expected
            root, whole = begin(states, verb, tmp_path / "root"), whole + 1
    last = harness.run(root, *words)
    assert last.code == 0, last.output
    assert harness.content(root, *written) == expected
    print(f"{verb}: {killed} kills within {lasts:.1f} s, {whole + 1} times to the same end")


def trials(root: Path) -> list[optuna.trial.FrozenTrial]:
    there = Path.cwd()
    os.chdir(root)
    try:
        return find_study(open_store()).get_trials()
    finally:
        os.chdir(there)


def test_a_killed_sweep_ends_with_its_trials(states: Path, tmp_path: Path) -> None:
    """The first trial is the study's own settings: no kill changes its value."""
    words = ("--backbone", "t", "--regime", "lora", "--train-set", "a", "--trials", "4")
    root = begin(states, "train", tmp_path / "root")
    undisturbed = harness.run(root, *words, inside=harness.sweep_with_forks)
    assert undisturbed.code == 0, undisturbed.output
    first = trials(root)[0]
    rng = np.random.default_rng(70)
    root, killed = begin(states, "train", tmp_path / "root"), 0
    while killed < KILLS:
        one = harness.run(
            root,
            *words,
            inside=harness.sweep_with_forks,
            kill_after=float(rng.uniform(0, undisturbed.seconds)),
        )
        assert not one.left, "orphans"
        assert one.code in (0, -9), one.output
        killed += one.code == -9
        if one.code == 0 or killed in (3, KILLS):
            last = harness.run(root, *words, inside=harness.sweep_with_forks)
            assert last.code == 0, last.output
            states_of = [t.state.name for t in trials(root)]
            assert sum(s in ("COMPLETE", "PRUNED") for s in states_of) == 4, states_of
            assert "RUNNING" not in states_of, states_of
            assert first.value in [t.value for t in trials(root) if t.params == first.params]
            root = begin(states, "train", tmp_path / "root")
    print(f"sweep: {killed} kills within {undisturbed.seconds:.1f} s")
