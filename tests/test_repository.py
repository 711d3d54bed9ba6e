"""Requirements, git, imports: what the files around the package promise."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


# -- unsafe calls


def unsafe_calls(source: str) -> list[str]:
    """Pickle, shells, torch.load with pickles, yaml.load, allow_pickle, evaluation of text."""
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
