"""The project's MLflow store: where it is, and how it is reached.

Everything here may raise or wait; `publish` keeps that away from training. MLflow costs 1.5 s to
import, so it is imported inside functions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from filelock import FileLock

from emadapt.errors import EmadaptError
from emadapt.tracking import views
from emadapt.tracking.relocate import moved, tracking_uri

LOCK = Path("scratch/track/.lock")
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what failed is published again later
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it shows a password in the URL
    "PGCONNECT_TIMEOUT": "5",
    "GIT_PYTHON_REFRESH": "quiet",
}
PATIENCE = 15.0
"""Seconds that one call may take before the store counts as dead."""
CREATION = 90.0
"""Seconds to create a database, behind other processes that want it too."""

_CLIENTS: dict[str, Any] = {}
"""Clients that have answered, by tracking URI."""


def client(root: Path) -> Any:
    """The client of the project's store, made once per process.

    Raises:
        EmadaptError: the checkout was moved.
        Exception: whatever MLflow raises when the store does not answer.
    """
    uri = tracking_uri(root)
    if uri in _CLIENTS:
        return _CLIENTS[uri]
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a plain line of ours instead
    if (old := moved(root)) is not None:
        raise EmadaptError(
            f"this checkout was moved here from {old}; run `emadapt track relocate {old}` once"
        )

    is_file = uri.startswith("sqlite:")

    def connect() -> Any:
        lock: Any = contextlib.nullcontext()
        if is_file:  # one process creates it; others at the same time would crash in it
            (root / LOCK).parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(root / LOCK)
        with lock:
            made = MlflowClient(uri, registry_uri=uri)
            made.search_experiments(max_results=1)
        return made

    _CLIENTS[uri] = within(CREATION if is_file else PATIENCE, connect)
    return _CLIENTS[uri]


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Run a call in a thread, and give it up after some seconds.

    Drivers' own limits reach from 20 s to never. The call may still succeed later, so it must be
    one that can be repeated.

    Raises:
        TimeoutError: no answer in time.
        BaseException: what the call raises.
    """
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised by `result`, in the caller's thread
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # an executor would wait for it at exit
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def find(store: Any, experiment: str, tags: Mapping[str, str]) -> Any:
    """The latest run of an experiment with all these tags, or None."""
    where = " and ".join(f"tags.`{name}` = {json.dumps(value)}" for name, value in tags.items())
    order = ["attributes.start_time DESC"]
    runs = store.search_runs([experiment], where, max_results=1, order_by=order)
    return runs[0] if runs else None


def experiment_of(store: Any, root: Path, study: str) -> str:
    """Id of a study's experiment: made if missing, taken out of the bin if somebody deleted it."""
    from mlflow.exceptions import MlflowException

    experiment = store.get_experiment_by_name(study)
    if experiment is None:
        # A server knows where its artifacts go. For a database it would be the current folder.
        is_file = tracking_uri(root).startswith("sqlite:")
        folder = root / "mlruns" / re.sub(r"[^\w.-]", "_", study)
        named = folder.as_uri() if re.search("[?#%]", str(root)) else str(folder)
        place = named if is_file else None
        try:
            made = str(store.create_experiment(study, place, views.KIND))
        except MlflowException:  # another process was faster
            experiment = store.get_experiment_by_name(study)
        else:
            views.describe(views.refresh_experiment, store, made)
            return made
    if experiment.lifecycle_stage == "deleted":
        store.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)
