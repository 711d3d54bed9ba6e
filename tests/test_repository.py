"""The files around the package: what they name must exist, and what they promise must hold.

No Docker engine is needed: Dockerfile and compose.yaml are parsed here.
"""

import ast
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import emadapt

ROOT = Path(__file__).resolve().parents[1]
SAFE_SETTINGS = {
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Programs of the base images that the files may use.
PYTHON_IMAGE = {"apt-get", "groupadd", "install", "pip", "python", "rm", "useradd"}
POSTGRES_IMAGE = {"pg_isready"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked() -> dict[str, str]:
    """Versions of requirements.lock by canonical name."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) and pin.url is None for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments gone and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


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
    copied = [word for rest in arguments("COPY") for word in shlex.split(rest)[:-1] if not word.startswith("--")]
    assert {"requirements.lock", "pyproject.toml", "src"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), f"COPY {path}: not in the repository"
        assert not dockerignored(path), f"COPY {path}: .dockerignore keeps it out"


@pytest.mark.parametrize("path", [".env", ".git/config", "data/lucchi/a.png", "mlflow.db", "src/emadapt/__pycache__"])
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
    exported = dict(re.findall(r"^export (\w+) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
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
    mounts = [mount.split(":")[:2] for service in file["services"].values() for mount in service.get("volumes", [])]
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
    (hosts,) = [word for word in services["mlflow"]["command"] if word.startswith("--allowed-hosts=")]
    assert uri.removeprefix("http://") in hosts.split("=")[1].split(",")
    assert uri.removeprefix("http://").split(":")[0] in services
    assert f"--port={uri.rsplit(':')[-1]}" in services["mlflow"]["command"]
    store = services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    driver, host = re.fullmatch(r"postgresql\+(\w+)://.*@(\w+):5432/mlflow", store).groups()  # type: ignore[union-attr]
    assert host in services
    assert [r for r in project()["project"]["optional-dependencies"]["postgres"] if r.startswith(driver)]
    assert f"{driver}-binary" in locked()


@pytest.mark.slow
def test_mlflow_server_options_exist() -> None:
    from mlflow.cli import server  # takes seconds

    known = {option for parameter in server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "mlflow server" in line]
    for words in (compose()["services"]["mlflow"]["command"], line.split()):
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert "--workers" in used
        assert used <= known
    environment = {parameter.envvar for parameter in server.params}
    assert "MLFLOW_BACKEND_STORE_URI" in environment


def test_image_tag_is_the_version() -> None:
    assert {service["image"] for service in own_services().values()} == {f"emadapt:{emadapt.__version__}"}


# -- requirements


def test_lock_satisfies_the_project() -> None:
    pins = locked()
    assert (pins["torch"], pins["torchvision"]) == ("2.14.1", "0.29.1")
    assert (pins["mlflow"], pins["albumentations"]) == ("3.17.2", "2.0.8")
    metadata_ = project()["project"]
    extras = {name: group for name, group in metadata_["optional-dependencies"].items() if name != "napari"}  # brings Qt
    wanted = [Requirement(text) for group in (metadata_["dependencies"], *extras.values()) for text in group]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
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
    extras = {canonicalize_name(Requirement(text).name) for group in known["optional-dependencies"].values() for text in group}
    distributions = metadata.packages_distributions()
    others = imported - set(sys.stdlib_module_names) - {"emadapt", "empanada"}  # whose pins no extra can meet (models/outside.py)
    providers = {module: {canonicalize_name(name) for name in distributions.get(module, [module])} for module in others}
    allowed = {module: declared if module in at_the_top else declared | extras for module in others}
    assert {module: names for module, names in providers.items() if not names & allowed[module]} == {}


# -- Makefile and .ci/run


def make(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}}
    return subprocess.run(["make", *words], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)


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
    done = make("venv", f"PYTHON={python}", cwd=folder, RECORD=str(record), REAL_PYTHON=sys.executable, **environment)
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
            found += [name for name in modules if name.split(".")[0] in {"pickle", "cloudpickle", "dill"}]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        true = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
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
    assert unsafe_calls("torch.load(path, weights_only=True); np.load(path); subprocess.run(['dvc'])") == []
    files = sorted((ROOT / "src").rglob("*.py"))
    assert files
    assert {str(path): calls for path in files if (calls := unsafe_calls(path.read_text()))} == {}


def test_dockerfile_downloads_nothing_unchecked() -> None:
    assert not arguments("ADD")
    assert not re.search(r"curl|wget|pickle|torch\.load", " ".join(rest for _, rest in instructions()))
