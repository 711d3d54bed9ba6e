"""Bring MLflow up to date with a run: live, after an outage, or for a model from DVC's cache.

Publishing a run again changes nothing. So the same call serves a training that goes on, what was
kept during an outage, and `emadapt track sync`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from filelock import Timeout

from emadapt.tracking.redact import redact, said_by
from emadapt.tracking.relocate import tracking_uri
from emadapt.tracking.run import FOLDER, Run, load_run, now
from emadapt.tracking.send import replace_others, update
from emadapt.tracking.store import PATIENCE, client, within

log = logging.getLogger(__name__)

Log = Callable[[dict[str, float], int], None]

WAIT = 180.0
"""Seconds between tries of a store that does not answer, while a run is live."""
LAST_WAIT = 10.0
"""The same at the end of a run."""

_failed_at: dict[str, float] = {}
"""When a store failed last, on the clock of `time.monotonic`; one that answers is not there."""


@contextlib.contextmanager
def live(run: Run) -> Iterator[Log]:
    """Publish a run while something is at work, and at its end.

    An error makes it FAILED, Ctrl-C makes it KILLED, unless its status was set before that.

    Yields:
        A function that publishes numbers of a step.
    """
    if _mode() == "off":
        run.muted = True

    def log_step(values: dict[str, float], step: int) -> None:
        run.log(values, step)
        publish(run)

    run.status = "RUNNING"
    with _held(run):
        publish(run)
        try:
            with _watched(run):
                yield log_step
        except BaseException as error:
            if run.status == "RUNNING":
                run.status = "FAILED" if isinstance(error, Exception) else "KILLED"
                run.results["error"] = f"{type(error).__name__}: {error}"[:500]
            raise
        else:
            run.status = "FINISHED"
        finally:
            run.ended = now()
            publish(run)


@contextlib.contextmanager
def _watched(run: Run) -> Iterator[None]:
    """Let MLflow measure the machine, if the run wants it and is in MLflow."""
    if not run.watched or run.known is None:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    uri = tracking_uri(run.root)
    monitor = SystemMetricsMonitor(run.known.run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def publish(run: Run) -> str:
    """Bring MLflow up to date with a run. An outage is reported and stops nothing.

    The run is kept in a file until MLflow has all of it. With EMADAPT_TRACKING=off nothing happens;
    with EMADAPT_TRACKING=later the file waits for `sync`, as for jobs of a cluster, which must not
    all write to one SQLite file on a shared disk.

    Returns:
        MLflow's id of the run; empty if MLflow does not have it.
    """
    if run.muted or _mode() == "off":
        return ""
    with _held(run):
        try:
            run.save()
            kept = f"the run is kept in {run.file} for `emadapt track sync`"
        except OSError as error:
            kept = f"the run cannot be kept ({error}), so what is missing in MLflow is lost"
            log.warning("tracking: %s", redact(kept))
        if _mode() == "later" or not _deliver(run, kept, earlier_first=run.known is None):
            return ""
        if run.status != "RUNNING":
            run.remove()
    return str(run.known.run_id)


def sync(root: Path, name: str = "", but: str = "") -> tuple[int, int]:
    """Publish the runs that are kept in files, of processes that are no longer there.

    A run whose process died without ending it becomes KILLED. With `name` only runs of this name;
    never the run with the key `but`.

    Returns:
        Numbers of runs that were published, and that still wait.
    """
    root, done, left = root.resolve(), 0, 0
    pattern = f"{name}-{'[0-9a-f]' * 8}.json" if name else "*.json"
    runs = [run for file in (root / FOLDER).glob(pattern) if (run := _left_over(root, file))]
    for seen in sorted(runs, key=lambda run: run.began):
        if seen.key == but:
            continue
        try:
            with seen.lock.acquire(timeout=0):
                run = _left_over(root, seen.file)  # as its process left it
                if run and not left and _deliver(run, f"it is kept in {run.file}", patient=False):
                    run.remove()
                    done += 1
                else:
                    left += run is not None
        except Timeout:
            continue  # it lives
    return done, left


def _mode() -> str:
    return os.environ.get("EMADAPT_TRACKING", "").lower()


@contextlib.contextmanager
def _held(run: Run) -> Iterator[None]:
    """Hold the run's lock, so that `sync` in another process leaves it alone."""
    with contextlib.ExitStack() as stack:
        if not run.muted:
            with contextlib.suppress(OSError):  # `publish` will say that the disk takes nothing
                run.file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(run.lock)
        yield


def _left_over(root: Path, file: Path) -> Run | None:
    """The run in a file; one that was live has lost its process."""
    try:
        run = load_run(root, file)
    except FileNotFoundError:
        return None  # published a moment ago
    except (OSError, ValueError) as error:
        log.warning("tracking: %s: not a run: %s", file, error)
        return None
    if run.status == "RUNNING":
        run.status = "KILLED"
    return run


def _deliver(run: Run, kept: str, *, earlier_first: bool = False, patient: bool = True) -> bool:
    """Send to MLflow what it does not have; gives whether MLflow has all of the run.

    `kept` says where it is kept. With `earlier_first`, runs of its name that dead processes left
    go first: it may go on with one. With `patient`, a store that is out is tried only now and then.
    """
    uri = tracking_uri(run.root)
    wait = WAIT if run.status == "RUNNING" else LAST_WAIT
    if patient and uri in _failed_at and time.monotonic() - _failed_at[uri] < wait:
        return False
    try:
        store = client(run.root)
        if earlier_first and sync(run.root, run.name, but=run.key)[1]:
            raise ConnectionError("earlier runs of this name could not be published")
        update(store, run)
        if run.status == "FINISHED":
            within(PATIENCE, partial(replace_others, store, run.known))
    except Exception as error:  # whatever a driver or a proxy raises must not reach the training
        run.known = None
        if uri not in _failed_at:
            log.warning("tracking: %s: %s. Work goes on; %s", redact(uri), said_by(error), kept)
        _failed_at[uri] = time.monotonic()
        return False
    _failed_at.pop(uri, None)
    return True
