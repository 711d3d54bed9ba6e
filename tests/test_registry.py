"""Models in MLflow's registry: what goes in comes out, and is served."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from click.testing import CliRunner

from emadapt import api
from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.segment.model import find_model, open_model
from emadapt.study.regimes import regime_settings
from emadapt.tracking import store as mlflow_store
from emadapt.tracking.relocate import tracking_uri
from processes import until
from tiny import blobs, write_model

IMAGE = blobs((2, 60, 70), 3)[0]
VOXEL = (30.0, 5.0, 5.0)
NAMES = ("model.json", "model.safetensors")


def register(*words: str) -> str:
    return CliRunner().invoke(main, ["register", *words, "--name", "mito"]).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with two models, versions 1 and 2 of `mito`; the second is the champion."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(Path("build/units/first"))
        lora = regime_settings(kind="lora", rank=2, alpha=4)
        write_model(Path("second"), regime=lora, head="pyramid")
        assert register("first") == "register: models:/mito/1\n"
        said = register("second", "--alias", "champion")
        assert said == "register: models:/mito/2, models:/mito@champion\n"
        yield folder


@pytest.fixture(autouse=True)
def root(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def test_an_address_gives_the_registered_model(root):
    for address, folder in (
        ("models:/mito/1", root / "build/units/first"),
        ("models:/mito@champion", root / "second"),
    ):
        got = find_model(address)
        assert all((got / name).read_bytes() == (folder / name).read_bytes() for name in NAMES)
        assert find_model(address) == got  # fetched once
    for address, said in (
        ("models:/mito@nobody", "there is mito"),
        ("models:/other/1", "there is mito"),
        ("models:/mito", "models:/NAME@ALIAS"),
    ):
        with pytest.raises(InputError, match=said):
            find_model(address)


def test_an_alias_moves(root):
    for number in (3, 4):
        register("second", "--alias", "stable")
        assert find_model("models:/mito@stable") == find_model(f"models:/mito/{number}")


def test_a_version_says_what_it_is_and_holds_no_pickle_and_no_backbone(root):
    version = mlflow_store.client(root).get_model_version_by_alias("mito", "champion")
    assert version.tags["terms"].startswith("a: not known here.")
    assert version.description.startswith("# t-frozen-a-0\n")
    own = version.source.removeprefix("models:/")
    (weights,) = (path for path in (root / "mlruns").rglob(NAMES[1]) if own in str(path))
    held = {path.name for path in weights.parent.iterdir()}
    assert held == {"MLmodel", *NAMES, "model-card.md"}


@pytest.mark.slow
def test_mlflow_serves_what_the_api_gives(root):
    """A server of its own process answers a request as `api.segment` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = "mlflow models serve -m models:/mito@champion --env-manager local --host 127.0.0.1"
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow's uvicorn
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(root), "PATH": found}
    command = [sys.executable, "-m", *words.split(), "--port", port]
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None
        try:
            return bool(urllib.request.urlopen(f"{address}/ping", timeout=5))
        except (URLError, OSError):
            return False

    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        try:
            until(answers, 300, every=1)
            asked = {"inputs": IMAGE.tolist(), "params": {"voxel_nm": list(VOXEL)}}
            header = {"Content-Type": "application/json"}
            body = json.dumps(asked).encode()
            request = urllib.request.Request(f"{address}/invocations", body, header)
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.loads(response.read())
        finally:
            os.killpg(server.pid, 15)
    expected = api.segment(IMAGE, open_model("second"), VOXEL, probabilities=True)
    np.testing.assert_allclose(np.array(answer["predictions"], np.float32), expected, atol=1e-6)
