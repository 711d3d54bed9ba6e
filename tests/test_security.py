"""Nothing of a stranger runs, nothing listens beyond this machine, no password is written down."""

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from emadapt.cli import main
from emadapt.tracking.redact import redact
from tiny import make_study

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SECRET = "hunter2"
WORDS = st.text("abcXYZ019_-.~%/@:!$", min_size=1, max_size=12)


@functools.cache
def nodes(kind: type) -> list[tuple[Path, Any]]:
    """What of a kind stands in the package."""
    return [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kind)
    ]


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Calls of functions whose name ends so."""
    return [
        (path, node)
        for path, node in nodes(ast.Call)
        if ast.unparse(node.func).split(".")[-1] == name
    ]


def test_no_program_of_the_package_is_given_to_a_shell() -> None:
    """A list of arguments each: a string would be split by somebody."""
    found = [
        c for name in ("run", "Popen", "check_output", "check_call", "call") for c in calls(name)
    ]
    of_subprocess = [(path, node) for path, node in found if "subprocess" in ast.unparse(node.func)]
    assert of_subprocess
    for path, node in of_subprocess:
        assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), (
            f"{path}:{node.lineno}"
        )
    assert not [
        path
        for path in SOURCES
        if re.search(r"os\.(system|popen|exec|spawn)|pty\.spawn", path.read_text())
    ]


def test_nothing_that_unpickles_is_imported() -> None:
    refused = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path, node in nodes(ast.Import) + nodes(ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        assert not refused & {part for name in names for part in name.split(".")}, (
            f"{path}:{node.lineno}"
        )


def test_nothing_that_is_read_is_run() -> None:
    """No evaluation of text, no shell, no pickles in the files of torch and NumPy."""
    for path, node in nodes(ast.Call):
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{path}:{node.lineno}"
        assert name not in {"eval", "exec"}, where
        assert "True" not in {given.get("shell"), given.get("allow_pickle")}, where
        assert name != "torch.load" or given.get("weights_only") == "True", where


def test_yaml_is_read_by_safe_loaders_alone() -> None:
    """Of PyYAML `safe_load`; of ruamel safe ones, or the round trip, which makes no objects."""
    used = {
        ast.unparse(node.func)
        for _, node in nodes(ast.Call)
        if ast.unparse(node.func).startswith("yaml.")
    }
    assert used <= {"yaml.safe_load", "yaml.safe_dump"}
    for path, node in calls("YAML"):
        kinds = [
            k.value.value
            for k in node.keywords
            if k.arg == "typ" and isinstance(k.value, ast.Constant)
        ]
        assert kinds in ([], ["safe"], ["rt"]), f"{path}:{node.lineno}"


def test_servers_listen_on_this_machine_alone() -> None:
    everywhere = re.compile(r"0\.0\.0\.0|\[::\]|host=[\"']{2}|[\"']::[\"']")
    for path in [*SOURCES, ROOT / "Makefile"]:
        assert not everywhere.search(path.read_text()), path
    hosts = re.findall(r"--host[= ](\S+)", (ROOT / "Makefile").read_text())
    assert hosts == ["127.0.0.1"]
    for path, node in calls("LocalCluster"):
        assert {k.arg: ast.unparse(k.value) for k in node.keywords}["host"] == "'127.0.0.1'", path


# -- passwords


@given(user=WORDS, password=WORDS, host=st.sampled_from(["db", "127.0.0.1:5432", "h.example.org"]))
def test_a_password_is_taken_out_wherever_the_url_stands(
    user: str, password: str, host: str
) -> None:
    """Also one with / and @ in it, which people forget to encode."""
    secret = f"{SECRET}{password}"
    url = f"postgresql://{user}:{secret}@{host}/name"
    for text in (
        url,
        f"cannot reach {url}: refused",
        f"'{url}'",
        f"({url})",
        f"storage={url}, next",
    ):
        assert SECRET not in redact(text)
        assert f"@{host}/name" in redact(text)


@given(
    password=WORDS,
    key=st.sampled_from(["password", "PASSWORD", "sslpassword", "pwd", "token", "access_token"]),
)
def test_a_password_among_parameters_is_taken_out_and_json_stays_json(
    password: str, key: str
) -> None:
    value = {
        "storage": f"https://host/db?a=1&{key}={SECRET}{password}",
        "dsn": f"host=x {key}={SECRET} user=me",
        "next": [1],
    }
    redacted = redact(json.dumps(value))
    assert SECRET not in redacted
    assert json.loads(redacted)["next"] == [1]


def test_what_holds_no_password_stays() -> None:
    for text in ("me@host", "https://host/path", "a: b@c", "sqlite:////tmp/x.db"):
        assert redact(text) == text


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@127.0.0.1:9/sweeps",
        f"postgresql://me:{SECRET}@127.0.0.1:port/sweeps",
        f"postgresql://127.0.0.1:9/sweeps?user=me&password={SECRET}",
        f"mysql://me:{SECRET}@127.0.0.1/sweeps",
        f"postgresql+nodriver://me:{SECRET}@127.0.0.1/sweeps",
        f"me:{SECRET}@127.0.0.1",
        f"postgresql://me:{SECRET}@@127.0.0.1:9/sweeps",
        f"postgresql://me:a/{SECRET}@127.0.0.1:9/sweeps",
        f"sqlite:////nowhere/{'x' * 5}/a.db?password={SECRET}",
    ],
)
def test_no_verb_says_the_password_of_a_storage(
    url: str, tmp_path: Path, tracking_off: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study(tmp_path)
    target = ("--backbone", "t", "--train-set", "a", "--trials", "1")
    for words in (("sweep", "run", *target), ("sweep", "status"), ("sweep", "promote")):
        for given_by in (("--storage", url), ()):
            monkeypatch.setenv("EMADAPT_SWEEP_STORAGE", "" if given_by else url)
            result = CliRunner().invoke(main, [*words, *given_by])
            assert result.exit_code == 2, result.output
            assert SECRET not in result.output + str(result.exception), result.output
    kept = [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and SECRET.encode() in file.read_bytes()
    ]
    assert not kept
