"""Requirements, git, the image: what the files around the package promise."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for group in PROJECT["optional-dependencies"].values() for line in group]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SAFE = {
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment without telemetry."""


def text(name: str) -> str:
    return (ROOT / name).read_text()


def locked(kind: str) -> list[Requirement]:
    """The lines of requirementsKIND.lock; each is pinned, with hashes."""
    lock = text(f"requirements{kind}.lock")
    pin = r"^([\w.-]+==[^*\\\n]+)\\\n(?: +--hash=sha256:[0-9a-f]{64}.*\n)+"
    lines = re.findall(pin, lock, re.M)
    assert len(lines) == len(re.findall(r"^[^#\s]", lock, re.M)), "a line that is not pinned"
    return [Requirement(line) for line in lines]


def named(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


@pytest.mark.parametrize("python", ["3.11.0", "3.11.5", "3.12.0", "3.13.0", "3.14.0"])
def test_the_locks_satisfy_the_project_on_every_python(python):
    """Each package once, in a version of the project's ranges."""
    here = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    lines = [line for kind in ("", "-dev", "-gpu") for line in locked(kind)]
    lines = [line for line in lines if line.marker is None or line.marker.evaluate(here)]
    pins = {line.name: line.specifier for line in lines}
    assert len(pins) == len(lines)
    qt = PROJECT["optional-dependencies"]["napari"]
    for line in [*PROJECT["dependencies"], *(own for own in EXTRAS if own not in qt)]:
        wanted = Requirement(line)
        (pin,) = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pin.version), wanted


def test_torch_without_cuda_is_of_the_same_version():
    cpu = re.findall(r"^(torch\w*)(==.*)\+cpu$", text("requirements-cpu.lock"), re.M)
    gpu = {line.name: str(line.specifier) for line in locked("-gpu")}
    assert dict(cpu).items() <= gpu.items()
    assert len(cpu) == 2


def test_every_import_of_the_package_is_a_dependency():
    """A module that only comes with another package today would be missing tomorrow."""
    providers = metadata.packages_distributions()
    ours = set(sys.stdlib_module_names) | {"emadapt", "empanada"}  # empanada: models/mitonet.py
    required, extra = named(PROJECT["dependencies"]), named(EXTRAS)
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            for module in {name.split(".")[0] for name in modules} - ours:
                names = {canonicalize_name(name) for name in providers.get(module, [module])}
                allowed = required if node in tree.body else required | extra
                assert names & allowed, f"{path}: {module}"


IGNORED = """build/units/a/model.safetensors scratch/a data/lucchi/a.png .venv/bin/python .env
mlflow.db mlflow.db-journal mlruns/1/a reports/summary.json reports/domain/t-lora/pca.png"""
KEPT = """mlruns/README.md reports/leaderboard.md src/emadapt/data/volume.py
sample-store/files/md5/00/1 data.dvc"""


def test_git_keeps_neither_data_nor_what_is_made_of_it(tmp_path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    command = ["git", "check-ignore", *IGNORED.split(), *KEPT.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == IGNORED.split()


def test_the_image_and_make_send_no_telemetry_and_copy_what_is_there():
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    said = [(words[0], words[1:]) for line in lines if (words := shlex.split(line, comments=True))]
    environment = dict(w.split("=", 1) for name, words in said if name == "ENV" for w in words)
    exported = dict(re.findall(r"^export (\w+) := (\S+)$", text("Makefile"), re.M))
    assert environment.items() >= SAFE.items() <= exported.items()
    copied = [w for name, words in said if name == "COPY" for w in words[:-1] if w[:2] != "--"]
    assert {"requirements.lock", "pyproject.toml", "src"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)


def test_ports_are_local_and_passwords_required():
    ports = [port for own in COMPOSE["services"].values() for port in own.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    uses = re.findall(r"\$\{\w*(?:PASSWORD|SECRET)\w*([^}]*)\}", text("compose.yaml"))
    assert uses
    assert all(rest.startswith(":?") for rest in uses)


@pytest.mark.slow
def test_mlflow_server_options_exist():
    from mlflow.cli import server  # takes seconds

    known = {word for p in server.params for word in (*p.opts, *p.secondary_opts)}
    (line,) = [line for line in text("Makefile").splitlines() if "mlflow server" in line]
    for words in (COMPOSE["services"]["mlflow"]["command"], line.split()):
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert "--workers" in used
        assert used <= known
    assert "MLFLOW_BACKEND_STORE_URI" in {parameter.envvar for parameter in server.params}
