"""Take the pictures of MLflow in docs/img with headless Chromium: the table of runs, and curves.

Run it in the project root after a study: `python docs/screenshots.py demo`.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

PICTURES = {  # file: end of the address, width, height
    "mlflow-table.png": ("", 1480, 640),
    "mlflow-curves.png": ("&compareRunsMode=CHART", 1480, 1240),
}
# Not 127.0.0.1: there MLflow's page opens its assistant over half of the window.
HOST = "emadapt.test"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=40000"]
# A mouse that is elsewhere: without one Plotly's tool bars cover the charts.
MOUSE = (
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,"
    "primaryPointerType=4,availablePointerTypes=4"
)


@contextlib.contextmanager
def server(database: Path) -> Iterator[int]:
    """Serve MLflow on a free port of this machine, and give the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{database.resolve()}",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--allowed-hosts",
        f"{HOST}:{port},127.0.0.1:{port}",
        "--cors-allowed-origins",
        f"http://{HOST}:{port}",
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(120):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), timeout=1),
                ):
                    break
                time.sleep(1)
            else:
                log.seek(0)
                sys.exit(f"the MLflow server did not start:\n{log.read().decode()[-2000:]}")
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the server and its worker
            process.wait(30)


def chromium(address: str, *flags: str) -> str:
    """Let Chromium load a page, and return what it prints."""
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if program is None:
        sys.exit("Chromium is not installed: on Debian, apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        own = [f"--user-data-dir={profile}", f"--host-resolver-rules=MAP {HOST} 127.0.0.1"]
        done = subprocess.run(
            [program, *FLAGS, MOUSE, *own, *flags, address],
            check=True,
            capture_output=True,
            timeout=120,
        )
    return done.stdout.decode()


def picture(file: Path, address: str, width: int, height: int) -> None:
    """Take a screenshot. A page that stayed empty is an error."""
    chromium(address, f"--window-size={width},{height}", f"--screenshot={file.resolve()}")
    if file.stat().st_size < 40_000:
        sys.exit(f"{file}: the page stayed empty")
    print(f"{file}: {file.stat().st_size // 1000} kB")


def main() -> None:
    """Read the command line, serve the database, take the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="the MLflow experiment, which has the study's name")
    parser.add_argument("--database", type=Path, default=Path("mlflow.db"))
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    args = parser.parse_args()
    if not args.database.is_file():
        parser.error(
            f"{args.database} is not there: run a study first, or name the database with --database"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    with server(args.database) as port:
        experiment = MlflowClient(f"http://127.0.0.1:{port}").get_experiment_by_name(args.study)
        if experiment is None:
            sys.exit(f"{args.database} has no experiment {args.study!r}")
        page = f"http://{HOST}:{port}/#/experiments/{experiment.experiment_id}/runs"
        for file, (end, width, height) in PICTURES.items():
            view = f"?workflowType=machine_learning&viewStateShareKey=test-iou{end}"
            picture(args.out / file, page + view, width, height)


if __name__ == "__main__":
    main()
