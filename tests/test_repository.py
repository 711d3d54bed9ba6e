"""The files around the package: requirements, Makefile, .ci/run, git; what they promise must hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import emadapt
from project import locked, project

ROOT = Path(__file__).resolve().parents[1]


# -- requirements


def test_lock_satisfies_the_project() -> None:
    pins = locked()
    assert (pins["torch"], pins["torchvision"]) == ("2.14.1", "0.29.1")
    assert (pins["mlflow"], pins["albumentations"]) == ("3.17.2", "2.0.8")
    metadata_ = project()["project"]
    extras = {
        name: group
        for name, group in metadata_["optional-dependencies"].items()
        if name != "napari"
    }  # brings Qt
    wanted = [
        Requirement(text)
        for group in (metadata_["dependencies"], *extras.values())
        for text in group
    ]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (
            requirement
        )
    assert "albumentationsx" not in pins


def test_lock_needs_nothing_local() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"file:|https?:|^-|(?<!\S)@|\+(cpu|cu\d+)", text, re.MULTILINE)


def test_every_import_of_the_package_is_a_dependency() -> None:
    """A module that only comes along with some other package today would be missing tomorrow; extras serve within functions."""
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
    others = (
        imported - set(sys.stdlib_module_names) - {"emadapt", "empanada"}
    )  # whose pins no extra can meet (models/outside.py)
    providers = {
        module: {canonicalize_name(name) for name in distributions.get(module, [module])}
        for module in others
    }
    allowed = {module: declared if module in at_the_top else declared | extras for module in others}
    assert {
        module: names for module, names in providers.items() if not names & allowed[module]
    } == {}


# -- Makefile and .ci/run


def make(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}
    }
    return subprocess.run(
        ["make", *words],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_targets_exist() -> None:
    for target in ("help", "venv", "repro", "test", "lint", "site", "ui", "lock", "clean"):
        done = make("-n", target)
        assert done.returncode == 0, done.stderr
        assert target in make().stdout
    assert "dvc pull" in make("-n", "repro").stdout
    assert "emadapt repro" in make("-n", "repro").stdout
    assert "--host 127.0.0.1" in make("-n", "ui").stdout


# An interpreter that makes fake environments (copies of itself) and only records what pip is asked for.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*_base_executable*) echo "$(dirname "$0")/python" ;;
    "-c "*"(3, 11)"*) exit "${OLD:-0}" ;;
    "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo venv >>"$RECORD" ;;
    "-m pip") echo pip >>"$RECORD"; exit "${PIP_FAILS:-0}" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, requirements, and a fake interpreter at bin/python."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(FAKE_PYTHON)
    (tmp_path / "bin/python").chmod(0o755)
    return tmp_path


def set_up(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs `make venv` with the fake interpreter; gives the process and what was done."""
    record = folder / "record"
    record.write_text("")
    python = str(folder / "bin/python")
    done = make(
        "venv",
        f"PYTHON={python}",
        cwd=folder,
        RECORD=str(record),
        REAL_PYTHON=sys.executable,
        **environment,
    )
    return done, record.read_text().split()


def test_set_up_happens_once_and_again_when_stale(checkout: Path) -> None:
    everything = ["venv", "pip", "pip"]
    assert set_up(checkout)[1] == everything
    assert set_up(checkout)[1] == []
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert set_up(checkout)[1] == ["pip", "pip"]
    assert set_up(checkout)[1] == []
    moved = checkout.rename(checkout.with_name("moved"))
    assert set_up(moved)[1] == everything
    (moved / ".venv/stamp").write_text(f"3.10.1 {moved}/.venv\nother\n")  # another Python
    assert set_up(moved)[1] == everything


def test_failed_set_up_does_not_count(checkout: Path) -> None:
    done, steps = set_up(checkout, PIP_FAILS="1")
    assert done.returncode != 0
    assert steps == ["venv", "pip"]
    assert set_up(checkout)[1] == ["venv", "pip", "pip"]
    (checkout / "pyproject.toml").write_text("# changed\n")
    assert set_up(checkout, PIP_FAILS="1")[0].returncode != 0
    assert set_up(checkout)[1] == ["venv", "pip", "pip"]


def test_set_up_says_which_python_it_needs(checkout: Path) -> None:
    done, steps = set_up(checkout, OLD="1")
    assert done.returncode != 0
    assert "3.11 or newer" in done.stderr
    assert steps == []
    done = make("venv", "PYTHON=no-such-python", cwd=checkout)
    assert done.returncode != 0
    assert "no 'no-such-python' found" in done.stderr


def test_ci_script_runs_what_the_readme_names() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    assert "make lint" in text
    assert "make test" in text
    minutes = sum(int(limit) for limit in re.findall(r"^step .*?(\d+)m ", text, re.MULTILINE))
    assert 0 < minutes <= 51  # were every step to use up its limit


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
        ("reports/summary.json", False),
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


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == emadapt.__version__
    assert citation["license"] == project()["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"## [{emadapt.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# -- unsafe calls


def unsafe_calls(source: str) -> list[str]:
    """Pickle, shells, torch.load without weights_only=True, yaml.load, allow_pickle=True, evaluation of text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found += [
                name for name in modules if name.split(".")[0] in {"pickle", "cloudpickle", "dill"}
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        true = {
            k.arg
            for k in node.keywords
            if isinstance(k.value, ast.Constant) and k.value.value is True
        }
        if (
            name in {"os.system", "os.popen", "yaml.load", "joblib.load", "eval", "exec"}
            or "shell" in true
            or "allow_pickle" in true
        ):
            found.append(name)
        if name == "torch.load" and "weights_only" not in true:
            found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_calls_are_found(source: str) -> None:
    assert unsafe_calls(source)


def test_no_unsafe_call_in_the_package() -> None:
    assert (
        unsafe_calls("torch.load(path, weights_only=True); np.load(path); subprocess.run(['dvc'])")
        == []
    )
    files = sorted((ROOT / "src").rglob("*.py"))
    assert files
    assert {str(path): calls for path in files if (calls := unsafe_calls(path.read_text()))} == {}
