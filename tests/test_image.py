"""Dockerfile and compose.yaml, parsed without a Docker engine: what they name must exist, and what they promise must hold."""

import fnmatch
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

import emadapt
from project import SAFE_SETTINGS, locked, project

ROOT = Path(__file__).resolve().parents[1]
# Programs of the base images that the files may use.
PYTHON_IMAGE = {"apt-get", "groupadd", "install", "pip", "python", "rm", "useradd"}
POSTGRES_IMAGE = {"pg_isready"}


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


def image_programs() -> set[str]:
    """Names of the programs that the image has: Debian packages, console scripts of the locked packages, emadapt."""
    found = set(PYTHON_IMAGE)
    for rest in arguments("RUN"):
        for command in rest.split("&&"):
            words = shlex.split(command)
            if words[:2] == ["apt-get", "install"]:
                found |= {word for word in words[2:] if not word.startswith("-")}
    names = set(locked()) | {"emadapt"}
    for script in metadata.entry_points(group="console_scripts"):
        if script.dist is not None and canonicalize_name(script.dist.metadata["Name"]) in names:
            found.add(script.name)
    return found


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def own_services() -> dict[str, dict[str, Any]]:
    """The services that run the image of the Dockerfile."""
    return {name: service for name, service in compose()["services"].items() if "build" in service}


def verbs() -> set[str]:
    """Verbs of the command line."""
    from emadapt.cli import main

    return set(main.commands)


def dockerignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the builder: the last pattern that matches it or a parent decides."""
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


def test_image_has_what_its_commands_run() -> None:
    programs = image_programs()
    assert {"git", "tini", "dvc", "mlflow", "emadapt"} <= programs
    for rest in arguments("RUN"):
        for command in rest.split("&&"):
            assert shlex.split(command)[0] in programs, command
    for instruction in ("ENTRYPOINT", "CMD"):
        (rest,) = arguments(instruction)
        assert yaml.safe_load(rest)[0] in programs, rest
    assert yaml.safe_load(arguments("ENTRYPOINT")[0])[0] == "tini"


def test_image_is_pinned_and_not_root() -> None:
    (base,) = arguments("FROM")
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    assert base.split(":")[1].split("-")[0] == ".".join(map(str, minimum_python()))
    build_arguments = dict(rest.split("=") for rest in arguments("ARG"))
    user = arguments("USER")[-1]
    for name, value in build_arguments.items():
        user = user.replace(f"${{{name}}}", value)
    assert user.split(":")[0] not in {"root", "0"}
    assert re.fullmatch(r"\d+:\d+", user)
    last_root_step = max(i for i, (name, _) in enumerate(instructions()) if name == "RUN")
    assert [name for name, _ in instructions()].index("USER") > last_root_step


def minimum_python() -> tuple[int, int]:
    major, minor = project()["project"]["requires-python"].removeprefix(">=").split(".")
    return int(major), int(minor)


def test_safe_settings_in_image_and_makefile() -> None:
    assert SAFE_SETTINGS.items() <= image_environment().items()
    exported = dict(
        re.findall(r"^export (\w+) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    assert SAFE_SETTINGS.items() <= exported.items()


def test_no_secret_in_dockerfile() -> None:
    settings = list(image_environment()) + [rest.split("=")[0] for rest in arguments("ARG")]
    assert not [name for name in settings if re.search("TOKEN|PASSWORD|SECRET|KEY", name)]


def test_cache_folder_is_a_volume_with_an_owner() -> None:
    volumes = yaml.safe_load(arguments("VOLUME")[0])
    made = [shlex.split(command) for rest in arguments("RUN") for command in rest.split("&&")]
    (owned,) = [words for words in made if words[0] == "install"]
    assert set(volumes) == {word for word in owned if word.startswith("/")}
    assert any(image_environment()["HF_HOME"].startswith(volume) for volume in volumes)
    assert arguments("WORKDIR")[-1] in volumes


# -- compose.yaml


def test_services_run_programs_of_their_image() -> None:
    programs = image_programs()
    for name, service in own_services().items():
        command = service["command"]
        assert command[0] in programs, name
        if command[0] == "emadapt":
            assert command[1] in verbs(), name
        if "healthcheck" in service:
            assert service["healthcheck"]["test"][1] in programs
    assert compose()["services"]["postgres"]["healthcheck"]["test"][1] in POSTGRES_IMAGE


def test_volumes_are_defined_used_and_in_the_image() -> None:
    file = compose()
    mounts = [
        mount.split(":")[:2]
        for service in file["services"].values()
        for mount in service.get("volumes", [])
    ]
    named = {source for source, _ in mounts if not source.startswith(".")}
    assert named == set(file["volumes"])
    assert all((ROOT / source).exists() for source, _ in mounts if source.startswith("."))
    image_volumes = set(yaml.safe_load(arguments("VOLUME")[0]))
    for service in own_services().values():
        assert {mount.split(":")[1] for mount in service["volumes"]} <= image_volumes


def test_ports_are_local_and_passwords_required() -> None:
    text = (ROOT / "compose.yaml").read_text()
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    uses = re.findall(r"\$\{(\w*(?:PASSWORD|SECRET)\w*)([^}]*)\}", text)
    assert uses
    assert all(rest.startswith(":?") for _, rest in uses)


def test_services_wait_for_healthy_ones() -> None:
    services = compose()["services"]
    assert set(services["worker"]["depends_on"]) == {"mlflow"}
    assert set(services["mlflow"]["depends_on"]) == {"postgres"}
    for service in services.values():
        for name, rule in service.get("depends_on", {}).items():
            assert rule == {"condition": "service_healthy"}
            assert "healthcheck" in services[name]


def test_tracking_server_is_reachable_under_its_name() -> None:
    services = compose()["services"]
    uri = services["worker"]["environment"]["MLFLOW_TRACKING_URI"]
    (hosts,) = [
        word for word in services["mlflow"]["command"] if word.startswith("--allowed-hosts=")
    ]
    assert uri.removeprefix("http://") in hosts.split("=")[1].split(",")
    assert uri.removeprefix("http://").split(":")[0] in services
    assert f"--port={uri.rsplit(':')[-1]}" in services["mlflow"]["command"]
    store = services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    driver, host = re.fullmatch(r"postgresql\+(\w+)://.*@(\w+):5432/mlflow", store).groups()  # type: ignore[union-attr]
    assert host in services
    assert [
        r for r in project()["project"]["optional-dependencies"]["postgres"] if r.startswith(driver)
    ]
    assert f"{driver}-binary" in locked()


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


def test_dockerfile_downloads_nothing_unchecked() -> None:
    assert not arguments("ADD")
    assert not re.search(
        r"curl|wget|pickle|torch\.load", " ".join(rest for _, rest in instructions())
    )
