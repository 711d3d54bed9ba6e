"""What runs again after an edit: DVC's decisions and the real verbs, in one process.

`pytest tests/test_edits.py -m slow -s` prints the table of docs/architecture.md.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml

from shipped import emadapt
from tiny import build_backbone, make_study, settings, under_dvc


def params() -> dict[str, Any]:
    """Two regimes on two training sets; weights are in a file."""
    own = settings(epochs=1, steps_per_epoch=1)
    own["study"]["train_sets"] = ["a", "b"]
    own["train_sets"] = {"a": ["a"], "b": ["b"]}
    own["backbones"]["t"] |= {"source": "file", "file": "weights.pt", "views": 0}
    own["diagnose"] |= {"controls": False, "permutations": 3, "replicates": 2}
    return own


def write_weights(seed: int) -> None:
    state = build_backbone("tiny_dinov2", "random", seed=seed).vit.state_dict()
    torch.save(state, "weights.pt")


class Project:
    """A study under DVC; `repro` gives the stages that ran."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root)
        monkeypatch.setenv("EMADAPT_TRACKING", "off")
        write_weights(0)
        make_study(root, params(), ingested=False)
        self.sh = under_dvc(root)
        self.ran: list[str] = []
        self.stages: set[str] = set()

        def run(stage: Any, *_: Any, **__: Any) -> None:
            self.ran.append(stage.addressing)
            emadapt(*shlex.split(stage.cmd)[1:])

        monkeypatch.setattr("dvc.stage.run.cmd_run", run)

    def repro(self) -> set[str]:
        """All but `plan`, which always runs."""
        from dvc.repo import Repo

        self.ran.clear()
        with Repo() as repo:
            repo.reproduce()
            self.stages = {stage.addressing for stage in repo.index.stages}
        return set(self.ran) - {"plan"}

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        path = Path("params.yaml")
        own = yaml.safe_load(path.read_text())
        change(own)
        path.write_text(yaml.safe_dump(own, sort_keys=False))


@pytest.fixture
def project(tmp_path, monkeypatch, plain_pictures):
    return Project(tmp_path, monkeypatch)


def change_a_label_slice(project: Project) -> None:
    label = tifffile.imread("data/a/label.tif")
    label[0] = np.roll(label[0], 9, axis=0)
    tifffile.imwrite("data/a/label.tif", label, photometric="minisblack")
    project.sh("dvc", "add", "-q", "data")


EDITS: list[tuple[str, Callable[[Project], Any], list[str]]] = [
    (
        "`rank` of LoRA",
        lambda p: p.edit(lambda own: own["regimes"]["lora"].update(rank=3)),
        ["train@t-lora-*", "evaluate@t-lora-*", "diagnose@t-lora", "report"],
    ),
    (
        "`head_lr` of all",
        lambda p: p.edit(lambda own: own["train"].update(head_lr=2e-3)),
        ["train@*", "evaluate@*", "diagnose@t-lora", "report"],
    ),
    (
        "a label rule that means the same",
        lambda p: p.edit(lambda own: own["datasets"]["a"].update(foreground=">0")),
        ["ingest@a"],
    ),
    (
        "`voxel_nm` of a",
        lambda p: p.edit(lambda own: own["datasets"]["a"].update(voxel_nm=[30, 6, 6])),
        ["ingest@a", "train@t-*-a-0", "evaluate@*", "report"],
    ),
    (
        "`diagnose.slices`",
        lambda p: p.edit(lambda own: own["diagnose"].update(slices=6)),
        ["diagnose@*", "report"],
    ),
    ("the leaderboard is lost", lambda _: Path("reports/leaderboard.md").unlink(), ["report"]),
    (
        "one label slice of a",
        change_a_label_slice,
        ["ingest@*", "tokens@t-a", "train@t-*-a-0", "evaluate@*", "diagnose@*", "report"],
    ),
    (
        "a seed more",
        lambda p: p.edit(lambda own: own["study"].update(seeds=[0, 1])),
        ["train@t-*-1", "evaluate@t-*-1", "diagnose@*", "report"],
    ),
    (
        "a regime less",
        lambda p: p.edit(lambda own: own["study"].update(regimes=["frozen"])),
        ["report"],
    ),
    (
        "the weights file is replaced",
        lambda _: write_weights(1),
        ["tokens@*", "train@*", "evaluate@*", "diagnose@*", "report"],
    ),
]


def matches(pattern: str, stage: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), stage) is not None


@pytest.mark.slow
def test_an_edit_reruns_what_it_must_and_no_more(project):
    project.repro()
    rows = []
    for what, change, patterns in EDITS:
        change(project)
        ran = project.repro()
        rows.append((what, ran))
        must = {s for s in project.stages if any(matches(p, s) for p in patterns)}
        assert ran == must, what
    assert project.repro() == set()
    print("\n| changed | stages that ran |\n|---|---|")
    for what, ran in rows:
        print(f"| {what} | {', '.join(f'`{s}`' for s in sorted(ran))} |")


@pytest.mark.slow
def test_tokens_that_are_not_there_are_made_and_a_clone_is_clean(project, tmp_path, monkeypatch):
    """A regime that needs them is added; all is cleaned; a clone has what DVC has, another one
    trains again."""

    def select(*regimes: str) -> None:
        project.edit(lambda own: own["study"].update(regimes=list(regimes)))

    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    project.edit(lambda own: own["regimes"].update(unet2d={"kind": "unet2d"}))
    project.edit(lambda own: own["study"].update(train_sets=["a"]))
    select("unet2d")
    project.repro()
    assert not Path("scratch/tokens").exists()
    select("unet2d", "frozen", "lora")
    assert "report" in project.repro()
    for folder in ("build", "scratch"):
        shutil.rmtree(folder)
    project.edit(lambda own: own["diagnose"].update(replicates=3))
    assert project.repro() == {"diagnose@t-frozen", "diagnose@t-lora", "report"}

    project.sh("dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    project.sh("dvc", "push", "-q")
    project.sh("git", "add", "--all")
    project.sh("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a study")
    for clone in ("clone", "retrained"):
        project.sh("git", "clone", "-q", ".", clone)
    monkeypatch.chdir("retrained")
    shutil.copy("../weights.pt", "weights.pt")
    project.sh("dvc", "--cd", "retrained", "pull", "-q", "data.dvc")
    assert project.repro() == project.stages - {"plan", "data.dvc"}
    assert not project.sh("git", "-C", "retrained", "status", "--porcelain")
    monkeypatch.chdir("../clone")
    for words in (["pull", "-q"], ["repro", "-q", "plan"]):
        project.sh("dvc", "--cd", "clone", *words)
    assert project.sh("dvc", "--cd", "clone", "status").split() == ["plan:", "always", "changed"]
    assert not project.sh("git", "-C", "clone", "status", "--porcelain")
    select("unet2d", "lora")
    assert project.repro() == {"report"}
    project.edit(lambda own: own["regimes"]["lora"].update(rank=3))
    unit = "t-lora-a-0"
    assert project.repro() == {f"train@{unit}", f"evaluate@{unit}", "diagnose@t-lora", "report"}
    assert not Path("reports/domain/t-frozen.json").exists()
