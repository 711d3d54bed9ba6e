"""Dockerfile and compose.yaml, parsed without a Docker engine."""

import fnmatch
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import emadapt
from project import SAFE_SETTINGS

ROOT = Path(__file__).resolve().parents[1]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments gone and continued lines joined."""
    lines = [
        line
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()
    ]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for rest in arguments("ENV") for word in shlex.split(rest))


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def own_services() -> dict[str, dict[str, Any]]:
    """The services that run the image of the Dockerfile."""
    return {name: service for name, service in compose()["services"].items() if "build" in service}


def dockerignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches decides."""
    ignored = False
    candidates = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        glob = pattern.removeprefix("!")
        names = [c for c in candidates if fnmatch.fnmatch(c, glob.removeprefix("**/"))]
        if glob.startswith("**/"):
            names += [c for c in candidates if fnmatch.fnmatch(Path(c).name, glob[3:])]
        if names:
            ignored = not pattern.startswith("!")
    return ignored


# -- Dockerfile


def test_copied_paths_exist_and_reach_the_builder() -> None:
    copied = [
        word
        for rest in arguments("COPY")
        for word in shlex.split(rest)[:-1]
        if not word.startswith("--")
    ]
    assert {"requirements.lock", "pyproject.toml", "src"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), f"COPY {path}: not in the repository"
        assert not dockerignored(path), f"COPY {path}: .dockerignore keeps it out"


@pytest.mark.parametrize(
    "path", [".env", ".git/config", "data/lucchi/a.png", "mlflow.db", "src/emadapt/__pycache__"]
)
def test_builder_sees_no_data_and_no_secrets(path: str) -> None:
    assert dockerignored(path)


def test_safe_settings_in_image_and_makefile() -> None:
    assert SAFE_SETTINGS.items() <= image_environment().items()
    exported = dict(
        re.findall(r"^export (\w+) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    assert SAFE_SETTINGS.items() <= exported.items()


# -- compose.yaml


def test_ports_are_local_and_passwords_required() -> None:
    text = (ROOT / "compose.yaml").read_text()
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    uses = re.findall(r"\$\{(\w*(?:PASSWORD|SECRET)\w*)([^}]*)\}", text)
    assert uses
    assert all(rest.startswith(":?") for _, rest in uses)


@pytest.mark.slow
def test_mlflow_server_options_exist() -> None:
    from mlflow.cli import server  # takes seconds

    known = {
        option
        for parameter in server.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    (line,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "mlflow server" in line
    ]
    for words in (compose()["services"]["mlflow"]["command"], line.split()):
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert "--workers" in used
        assert used <= known
    environment = {parameter.envvar for parameter in server.params}
    assert "MLFLOW_BACKEND_STORE_URI" in environment


def test_image_tag_is_the_version() -> None:
    assert {service["image"] for service in own_services().values()} == {
        f"emadapt:{emadapt.__version__}"
    }
