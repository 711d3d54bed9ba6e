"""A tracking server that is dead, slow or answers nonsense: training goes on, to the same bytes."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import harness
import pytest

from emadapt.tracking import store
from emadapt.tracking.publish import publish
from emadapt.tracking.run import FOLDER, Run
from studies import VERBS, begin

pytestmark = pytest.mark.slow

SLOW = 0.3  # s before each answer
ANSWERS = {
    "500": (500, b'{"error_code": "INTERNAL_ERROR", "message": "me:hunter2@db is gone"}', 0.0),
    "slowly 503": (503, b"<html>busy</html>", SLOW),
    "no json": (200, b"<html>log in first</html>", 0.0),
    "login": (401, b"You are not authenticated", 0.0),
}


@contextmanager
def server(status: int, body: bytes, delay: float) -> Iterator[str]:
    """Answers every request alike; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PATCH = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://me:hunter2@127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


@pytest.mark.parametrize("how", [*ANSWERS, "dead"])
def test_training_goes_on_and_says_so(how: str, states: Path, tmp_path: Path) -> None:
    words, written = VERBS["train"]
    root = begin(states, "train", tmp_path / "root")
    with server(*ANSWERS.get(how, ANSWERS["500"])) as address:
        uri = address if how != "dead" else "http://me:hunter2@127.0.0.1:9"
        ended = harness.run(root, *words, EMADAPT_TRACKING="on", MLFLOW_TRACKING_URI=uri)
    assert ended.code == 0, ended.output
    assert harness.content(root, *written) == harness.content(states / "after-train", *written)
    assert "tracking: " in ended.output
    assert "emadapt track sync" in ended.output
    assert ("does not answer" in ended.output) == (how == "dead")
    assert "Traceback" not in ended.output
    assert "hunter2" not in ended.output
    (file,) = (root / "scratch/track").glob("*.json")
    assert len(json.loads(file.read_text())["metrics"]) > 3, "an entry for each epoch waits"
    assert not [f for f in root.rglob("*") if f.is_file() and b"hunter2" in f.read_bytes()]


def test_a_server_that_takes_long_to_store_a_file_gets_it(root: Path) -> None:
    file = root / "model.bin"
    file.write_bytes(b"weights")
    with server(200, b"{}", 6.0) as address:
        store.client(root).create_experiment("demo", f"{address}/artifacts")
        run = Run("demo", "u", {"unit": "u"}, artifacts={"model.bin": file}, root=root)
        assert publish(run)
    assert not list((root / FOLDER).glob("*.json"))
