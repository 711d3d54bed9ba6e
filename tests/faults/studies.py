"""The checkouts that verbs are disturbed in, and what each verb writes."""

import shutil
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tifffile

from tiny import make_study, settings, write_model

SEGMENT = "segment volume.tif out.tif --model model --voxel-nm 30 5 5 --instances --overwrite"
VERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ingest": (("ingest", "a"), ("build/ingest/a/*",)),
    "plan": (("plan",), ("build/plan/*/*",)),
    "tokens": (("tokens", "t", "a"), ("build/tokens/t/*", "scratch/tokens/*/*")),
    "train": (("train", "t-lora-a-0"), ("build/units/t-lora-a-0/*",)),
    "evaluate": (("evaluate", "t-frozen-a-0"), ("build/evaluate/t-frozen-a-0/*",)),
    "diagnose": (("diagnose", "t", "frozen"), ("reports/domain/*", "reports/domain/*/*")),
    "report": (("report",), ("reports/*", "reports/figures/*")),
    "segment": (tuple(SEGMENT.split()), ("out*",)),
}
"""Words of the command line, and the files that they make."""


def params() -> dict[str, Any]:
    chosen = settings(epochs=3, steps_per_epoch=4)
    chosen["study"] |= {"train_sets": ["a"]}
    chosen["diagnose"] |= {"permutations": 3, "replicates": 2}
    return chosen


def make_states(top: Path) -> Path:
    """Folders `before-VERB` and `after-VERB`: a checkout before and after an undisturbed run."""
    root = top / "root"
    root.mkdir()
    make_study(root, params(), ingested=False)
    write_model(root / "model")
    volume = np.random.default_rng(3).integers(0, 255, (12, 120, 150), dtype=np.uint8)
    tifffile.imwrite(root / "volume.tif", volume, photometric="minisblack")
    more: dict[str, list[tuple[str, ...]]] = {
        "ingest": [("ingest", "b")],
        "tokens": [("tokens", "t", "b")],
        "train": [("train", "t-frozen-a-0")],
        "evaluate": [("evaluate", "t-lora-a-0")],
        "diagnose": [("diagnose", "t", "lora")],
    }
    for verb, (words, _) in VERBS.items():
        shutil.copytree(root, top / f"before-{verb}")
        steps: list[tuple[str, ...]] = [words, *more.get(verb, [])]
        for each in steps:
            ended = harness.run(root, *each)
            assert ended.code == 0, ended.output
            if each == words:
                shutil.copytree(root, top / f"after-{verb}")
                (top / f"seconds-{verb}").write_text(str(ended.seconds))
    return top


def begin(states: Path, verb: str, to: Path) -> Path:
    """A checkout in which all is done that comes before the verb."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(states / f"before-{verb}", to)
    return to
