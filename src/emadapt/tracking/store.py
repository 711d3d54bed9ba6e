"""The project's MLflow store: where it is, how an entry of the lab book gets into it, how it follows a moved checkout.

Everything here may raise or wait; `tracking.py` is what keeps that away from training. MLflow costs 1.5 s to import,
so it is imported only inside functions.
"""

import fcntl
import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from emadapt.errors import EmadaptError, InputError
from emadapt.tracking import views as mlflow_page

log = logging.getLogger(__name__)

LOCK = Path("scratch/track/.lock")
# Five seconds is long for a healthy server; what failed is tried again from the spool, so no retries inside a call.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it breaks progress bars, and shows a password in the URL
    "PGCONNECT_TIMEOUT": "5",
    "GIT_PYTHON_REFRESH": "quiet",
}
PATIENCE = 15.0  # s that one call may take before the store counts as dead
# What MLflow answers when it understood an entry and will never take it; everything else is an outage.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
# Where MLflow keeps absolute paths, by table.
LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}

_CLIENTS: dict[str, Any] = {}  # tracking URI -> MlflowClient that has answered


def redact(text: str) -> str:
    """Takes user names and passwords out of the URLs in a text, up to the last @ of each: some have one in the password."""
    without = re.sub(r"://[^\s\"'<>]*@", "://***@", text)
    return re.sub(
        r"((?:password|pwd|token|secret)=)[^&\s\"'\\]+", r"\1***", without, flags=re.IGNORECASE
    )


def tracking_uri(root: Path) -> str:
    """The store: MLFLOW_TRACKING_URI if set (a relative sqlite path counts from the root), else <root>/mlflow.db.

    The default is where a plain `mlflow ui` in the root looks.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{root.resolve() / uri.removeprefix('sqlite:///')}"
    return uri


def client(root: Path) -> Any:
    """The client of the project's store, made once per process; raises if it does not answer or the root was moved."""
    uri = tracking_uri(root)
    if uri in _CLIENTS:
        return _CLIENTS[uri]
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(
            logging.CRITICAL
        )  # one plain line of ours instead of their tracebacks
    if (old := moved(root)) is not None:
        raise EmadaptError(
            f"this checkout was moved here from {old}; run `emadapt track relocate {old}` once"
        )

    def connect() -> Any:
        made = MlflowClient(uri, registry_uri=uri)
        made.search_experiments(max_results=1)
        return made

    def connect_alone() -> (
        Any
    ):  # a fresh database is created by one process; the others would crash in it
        (root / LOCK).parent.mkdir(parents=True, exist_ok=True)
        with open(root / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return connect()

    # Creating a database takes seconds, and other processes may be in the queue for it.
    _CLIENTS[uri] = (
        within(90, connect_alone) if uri.startswith("sqlite:") else within(PATIENCE, connect)
    )
    return _CLIENTS[uri]


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Runs a call in a thread and gives it up after some seconds: drivers' own limits reach from 20 s to never.

    Raises:
        TimeoutError: no answer in time. The call may still succeed later, so it must be one that can be repeated.
    """
    result: dict[str, Any] = {}

    def work() -> None:
        try:
            result["value"] = call()
        except BaseException as error:  # raised again below, in the caller's thread
            result["error"] = error

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if "error" in result:
        raise result["error"]
    return result["value"]


def find_run(root: Path, study: str, tags: Mapping[str, str]) -> str | None:
    """Id of the latest run of a study that has all these tags, or None. Raises what MLflow raises when it is down."""
    store = client(root.resolve())
    experiment = store.get_experiment_by_name(study)
    run = _find(store, experiment.experiment_id, tags) if experiment else None
    return run.info.run_id if run else None


def find_or_create(store: Any, root: Path, entry: dict[str, Any]) -> tuple[str, int | None]:
    """The run of an "open" entry: the one with its key, else with equal `resume_by` tags, else a new one.

    Returns:
        The run's id, and for a continued run when it ended before (ms, 0 if it never did), else None.
    """
    from mlflow.entities import RunTag

    experiment, tags = experiment_of(store, root, entry["study"]), entry["tags"]
    if run := _find(store, experiment, {"emadapt.key": entry["key"]}):
        return run.info.run_id, None
    wanted = {name: tags.get(name, "") for name in entry["resume_by"]}
    if wanted and all(wanted.values()) and (run := _find(store, experiment, wanted)):
        new = [RunTag(name, value) for name, value in tags.items() if name not in run.data.tags]
        store.log_batch(run.info.run_id, tags=new)
        store.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id, run.info.end_time or 0
    tags = {
        **mlflow_page.source_tags(tags),
        **tags,
        "origin": entry["origin"],
        "emadapt.key": entry["key"],
    }
    return store.create_run(experiment, entry["at"], tags, tags["unit"]).info.run_id, None


def send(
    store: Any, run_id: str, ended_before: int | None, folder: Path, batch: list[dict[str, Any]]
) -> None:
    """Puts entries of one kind into a run. Sending an entry again changes nothing.

    Args:
        store: from `client`.
        run_id, ended_before: from `find_or_create`.
        folder: what the paths of artifacts are relative to.
        batch: one entry, or several of kind "metrics".
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    entry = batch[0]
    match entry["do"]:
        case "metrics":
            metrics = [
                Metric(name, v, e["at"], e["step"])
                for e in batch
                for name, v in e["values"].items()
            ]
            if (
                ended_before is not None
            ):  # a resumed training repeats its last epoch: same numbers at another time
                names = {metric.key for metric in metrics}
                there = {
                    (m.key, m.step, m.value)
                    for name in names
                    for m in store.get_metric_history(run_id, name)
                }
                metrics = [m for m in metrics if (m.key, m.step, m.value) not in there]
            store.log_batch(run_id, metrics=metrics)
        case "params":
            known = store.get_run(run_id).data.params
            new = [
                Param(name, value) for name, value in entry["values"].items() if name not in known
            ]
            for at in range(0, len(new), 100):  # MLflow's limit
                store.log_batch(run_id, params=new[at : at + 100])
        case "tags":
            store.log_batch(
                run_id, tags=[RunTag(name, value) for name, value in entry["values"].items()]
            )
        case "artifact":
            store.log_artifact(run_id, str(folder / entry["path"]), entry["folder"])
        case "dataset":
            dataset = Dataset(
                entry["name"], entry["digest"], "local", json.dumps({"uri": entry["source"]})
            )
            store.log_inputs(
                run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", entry["context"])])]
            )
        case "end":
            at = entry["at"]
            if entry.get("lost") and store.get_run(run_id).info.status != "RUNNING":
                return  # another process went on with the run of the one that died, and ended it
            if (
                ended_before
            ):  # so that MLflow's duration is the time at work, without the days between
                at = ended_before + at - entry["began"]
            store.set_terminated(run_id, entry["status"], at)
            _describe(mlflow_page.refresh_run, store, run_id)


def _describe(refresh: Callable[[Any, str], None], store: Any, which: str) -> None:
    """Brings what a page says up to date. A failure is said and forgotten: nothing that was measured hangs on it."""
    try:
        refresh(store, which)
    except Exception as error:
        log.warning(
            "tracking: the description of %s is not up to date: %s", which, redact(str(error))
        )


def _find(store: Any, experiment: str, tags: Mapping[str, str]) -> Any:
    where = " and ".join(f"tags.`{name}` = {json.dumps(value)}" for name, value in tags.items())
    runs = store.search_runs(
        [experiment], where, max_results=1, order_by=["attributes.start_time DESC"]
    )
    return runs[0] if runs else None


def experiment_of(store: Any, root: Path, study: str) -> str:
    """The study's experiment, made where it is missing and taken out of the bin where somebody deleted it."""
    from mlflow.exceptions import MlflowException

    experiment = store.get_experiment_by_name(study)
    if experiment is None:
        # A server knows where its artifacts go; for a database it would be ./mlruns of wherever this process runs.
        local = tracking_uri(root).startswith("sqlite:")
        place = str(root / "mlruns" / re.sub(r"[^\w.-]", "_", study)) if local else None
        try:
            made = str(store.create_experiment(study, place, mlflow_page.KIND))
        except MlflowException:  # another process was faster
            experiment = store.get_experiment_by_name(study)
        else:
            _describe(mlflow_page.refresh_experiment, store, made)
            return made
    if experiment.lifecycle_stage == "deleted":
        store.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def moved(root: Path) -> str | None:
    """The root before a move or a copy: where experiments of <root>/mlflow.db keep artifacts outside this root."""
    if (
        tracking_uri(root) != f"sqlite:///{root.resolve() / 'mlflow.db'}"
        or not (root / "mlflow.db").is_file()
    ):
        return None
    try:
        with sqlite3.connect(
            f"file:{quote(str(root.resolve()))}/mlflow.db?mode=ro", uri=True, timeout=5
        ) as database:
            rows = database.execute(
                "SELECT artifact_location FROM experiments WHERE experiment_id != 0"
            ).fetchall()
    except sqlite3.Error:
        return None  # not created yet, or locked: opening it will tell
    for (place,) in rows:
        path = (place or "").removeprefix("file://")
        if (
            path.startswith("/")
            and "/mlruns/" in path
            and not path.startswith(f"{root.resolve()}/")
        ):
            return path[: path.rindex("/mlruns/")]
    return None


def relocate(root: Path, old_root: str) -> int:
    """Makes the artifacts of a moved checkout found again: rewrites the old root in the database, all or nothing.

    Args:
        root: the project root as it is now.
        old_root: the root as it was.

    Returns:
        How many locations were rewritten.

    Raises:
        InputError: the store is not a local database, or there is none.
    """
    uri = tracking_uri(root)
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:") or not file.is_file():
        expected = "the local database of a checkout that was moved"
        raise InputError(
            redact(uri),
            found="no database file",
            expected=expected,
            do="Run it in the moved checkout.",
        )
    old, new = old_root.rstrip("/"), str(root.resolve())
    count, database = 0, sqlite3.connect(file, timeout=30)
    try:
        with database:  # one transaction
            for table, column in LOCATIONS.items():
                for (value,) in database.execute(
                    f"SELECT DISTINCT {column} FROM {table}"  # noqa: S608
                ).fetchall():
                    for before, after in (
                        (old, new),
                        (f"file://{quote(old)}", f"file://{quote(new)}"),
                    ):
                        # Moved into itself (/a to /a/b): what is right already must not become /a/b/b.
                        done = after.startswith(f"{before}/") and f"{value}/".startswith(
                            f"{after}/"
                        )
                        if f"{value}/".startswith(f"{before}/") and not done:
                            change = f"UPDATE {table} SET {column} = ? WHERE {column} = ?"  # noqa: S608 - names of ours
                            count += database.execute(
                                change, (after + value[len(before) :], value)
                            ).rowcount
    finally:
        database.close()
    _CLIENTS.pop(uri, None)
    return count
