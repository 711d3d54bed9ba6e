"""Models in MLflow's registry: what goes in comes out, and is served."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from emadapt import api
from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.segment.model import find_model, open_model
from emadapt.study.regimes import regime_settings
from emadapt.tracking import store as mlflow_store
from emadapt.tracking.relocate import tracking_uri
from tiny import blobs, write_model

IMAGE = blobs((2, 60, 70), 3)[0]
VOXEL = (30.0, 5.0, 5.0)
NAMES = ("model.json", "model.safetensors")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with two models, versions 1 and 2 of `mito`; the second is the champion."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(Path("build/units/first"))
        write_model(
            Path("second"), regime=regime_settings(kind="lora", rank=2, alpha=4), head="pyramid"
        )
        assert run("register", "first", "--name", "mito").stdout == "register: models:/mito/1\n"
        result = run("register", "second", "--name", "mito", "--alias", "champion")
        assert result.stdout == "register: models:/mito/2, models:/mito@champion\n"
        yield folder


@pytest.fixture(autouse=True)
def _there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def test_an_address_gives_the_registered_model(root: Path) -> None:
    for address, folder in (
        ("models:/mito/1", root / "build/units/first"),
        ("models:/mito@champion", root / "second"),
    ):
        got = find_model(address)
        assert [(got / name).read_bytes() for name in NAMES] == [
            (folder / name).read_bytes() for name in NAMES
        ]
        assert "# t-frozen-a-0" in (got / "model-card.md").read_text()
        assert find_model(address) == got  # fetched once
    probability = api.segment(IMAGE, open_model("models:/mito@champion"), VOXEL, probabilities=True)
    np.testing.assert_array_equal(
        probability, api.segment(IMAGE, open_model("second"), VOXEL, probabilities=True)
    )


def test_an_alias_moves(root: Path) -> None:
    for number in (3, 4):
        result = run("register", "second", "--name", "mito", "--alias", "stable")
        assert result.stdout == f"register: models:/mito/{number}, models:/mito@stable\n"
        assert find_model("models:/mito@stable") == find_model(f"models:/mito/{number}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/mito@nobody", "there is mito"),
        ("models:/other/1", "there is mito"),
        ("models:/mito", "models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_there(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_model(address)


def test_a_version_says_what_it_is_and_holds_no_pickle_and_no_backbone(root: Path) -> None:
    version = mlflow_store.client(root).get_model_version_by_alias("mito", "champion")
    assert version.tags["terms"].startswith("a: not known here.")
    assert version.description.startswith("# t-frozen-a-0\n")
    own = version.source.removeprefix("models:/")
    (weights,) = (path for path in (root / "mlruns").rglob("model.safetensors") if own in str(path))
    held = {path.name for path in weights.parent.iterdir()}
    assert held == {"MLmodel", "model.json", "model.safetensors", "model-card.md"}


@pytest.mark.slow
def test_mlflow_serves_what_the_api_gives(root: Path) -> None:
    """A server of its own process answers a request as `api.segment` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/mito@champion",
        "--env-manager",
        "local",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow's uvicorn
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(root), "PATH": found}
    with (
        Path("served.log").open("wb") as log,
        subprocess.Popen(
            command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            body = json.dumps(
                {"inputs": IMAGE.tolist(), "params": {"voxel_nm": list(VOXEL)}}
            ).encode()
            answer = json.loads(_post(f"http://127.0.0.1:{port}", body, server))
        finally:
            os.killpg(server.pid, 15)
    expected = api.segment(IMAGE, open_model("second"), VOXEL, probabilities=True)
    np.testing.assert_allclose(np.array(answer["predictions"], np.float32), expected, atol=1e-6)


def _post(address: str, body: bytes, server: subprocess.Popen[bytes]) -> bytes:
    """The answer of a server that may still be starting."""
    for _ in range(300):
        assert server.poll() is None, Path("served.log").read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/ping", timeout=5).close()
            break
        except OSError:
            time.sleep(1)
    request = urllib.request.Request(
        f"{address}/invocations", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()[:2000]) from None
