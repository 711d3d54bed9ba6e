"""Requirements, git, imports: what the files around the package promise."""

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from project import locked, project

ROOT = Path(__file__).resolve().parents[1]


# -- requirements


PYTHONS = ("3.11.0", "3.11.5", "3.12.0", "3.13.0", "3.14.0")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_satisfy_the_project_on_every_python(python: str) -> None:
    """Each package once, in a version of the project's ranges: for its oldest Python, too."""
    here: Any = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    lines = [line for line in locked("", "-dev", "-gpu") if _wanted(line, here)]
    pins = {line.name: line.specifier for line in lines}
    assert len(pins) == len(lines)
    groups = project()["project"]["optional-dependencies"] | {"napari": []}  # it brings Qt
    for text in sum(groups.values(), project()["project"]["dependencies"]):
        wanted = Requirement(text)
        (pin,) = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pin.version), wanted
    assert project()["project"]["requires-python"] == ">=3.11"


def _wanted(line: Requirement, environment: dict[str, str]) -> bool:
    return line.marker is None or line.marker.evaluate(environment)


def test_the_image_gets_nothing_for_developers() -> None:
    names = {line.name for line in locked("")}
    extras = project()["project"]["optional-dependencies"]
    own = {Requirement(text).name for text in extras["dev"]} - {"transformers", "tomli"}  # sam2
    assert not names & own
    assert not any("dev" in words for words in re.findall("COPY.*lock.*", _text("Dockerfile")))


def test_torch_without_cuda_is_of_the_same_version() -> None:
    cpu = re.findall(r"^(torch\w*)==(.*)\+cpu$", _text("requirements-cpu.lock"), re.M)
    gpu = {line.name: line.specifier for line in locked("-gpu")}
    assert [f"=={version}" for _, version in cpu] == [str(gpu[name]) for name, _ in cpu]
    assert len(cpu) == 2


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def test_every_import_of_the_package_is_a_dependency() -> None:
    """A module that only comes with another package today would be missing tomorrow."""
    imported, at_the_top = set(), set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = {node.module.split(".")[0]}
            imported |= names
            at_the_top |= names if node in tree.body else set()
    known = project()["project"]
    declared = {canonicalize_name(Requirement(text).name) for text in known["dependencies"]}
    extras = {
        canonicalize_name(Requirement(text).name)
        for group in known["optional-dependencies"].values()
        for text in group
    }
    distributions = metadata.packages_distributions()
    # Whose pins no extra can meet (models/outside.py).
    others = imported - set(sys.stdlib_module_names) - {"emadapt", "empanada"}
    providers = {
        module: {canonicalize_name(name) for name in distributions.get(module, [module])}
        for module in others
    }
    allowed = {module: declared if module in at_the_top else declared | extras for module in others}
    assert {
        module: names for module, names in providers.items() if not names & allowed[module]
    } == {}


def test_workflow_and_devcontainer_run_what_ci_runs() -> None:
    """The same targets of make, on every Python that the package names."""
    ours = set(_made(_text(".ci/run")))
    workflow = yaml.safe_load(_text(".github/workflows/checks.yml"))["jobs"]["checks"]
    ran = _made("\n".join(step.get("run", "") for step in workflow["steps"]))
    assert set(ran) == ours
    assert _made(json.loads(_text(".devcontainer/devcontainer.json"))["postCreateCommand"])
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project()["project"]["classifiers"]))
    assert workflow["strategy"]["matrix"]["python"] == named


def _made(text: str) -> list[str]:
    """Targets that a text has made."""
    return " ".join(re.findall(r"\bmake ([a-z ]+)", text)).split()


# -- git, versions


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("build/units/a/model.safetensors", True),
        ("scratch/a", True),
        ("data/lucchi/a.png", True),
        (".venv/bin/python", True),
        (".env", True),
        ("mlflow.db", True),
        ("mlflow.db-journal", True),
        ("mlruns/1/a", True),
        ("mlruns/README.md", False),
        ("reports/summary.json", True),
        ("reports/domain/t-lora/pca.png", True),
        ("reports/leaderboard.md", False),
        ("src/emadapt/data/volume.py", False),
        ("sample-store/files/md5/00/1", False),
        ("data.dvc", False),
    ],
)
def test_gitignore(tmp_path: Path, path: str, ignored: bool) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    done = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=tmp_path, check=False)
    assert done.returncode == (0 if ignored else 1)
