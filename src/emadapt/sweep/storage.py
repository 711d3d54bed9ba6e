"""Where sweeps are kept: a journal file for one machine, PostgreSQL for several."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from emadapt.errors import InputError
from emadapt.tracking.redact import redact, said_by

FOLDER = Path("scratch/sweeps")
HEARTBEAT = 10
"""Seconds between two signs of life of a trial in PostgreSQL."""
GRACE = 60
"""Seconds of silence after which such a trial counts as dead."""
MAX_RETRIES = 3
"""How often a trial is started again after its process died: the trial may be what kills it."""
POSTGRES = {
    "connect_timeout": 5,
    # A machine without power loses its locks after about 25 s.
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
}
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
"""What Optuna raises when the storage, not a trial, is in trouble."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Store:
    """An open storage of sweeps."""

    storage: BaseStorage  # Optuna's
    url: str = ""  # of the database; empty for the journal

    @property
    def words(self) -> str:
        """Where it is, without a password."""
        return redact(self.url) or str(FOLDER / "journal.log")

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """On the journal, let only one `sweep run` work on a sweep.

        Then a trial that is running when it starts has lost its process.

        Raises:
            InputError: another one is at work.
        """
        if self.url:
            yield
            return
        try:
            held = FileLock(FOLDER / f"{name}.lock").acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"sweep {name}",
                found="another `emadapt sweep run` at work on it",
                expected="one at a time",
                do="Give it more --workers; for several machines use a PostgreSQL --storage.",
            ) from None
        with held:
            yield

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """In PostgreSQL, let one machine after the other set up a sweep."""
        with _postgres_lock(self.url, name) if self.url else contextlib.nullcontext():
            yield


def open_store(url: str = "") -> Store:
    """Open a storage and make its tables if they are missing.

    Args:
        url: postgresql://user:password@host/database; empty for scratch/sweeps/journal.log.

    Raises:
        InputError: another kind of URL, a database that does not answer, or no right to write.
    """
    _silence_optuna()
    if not url:
        return Store(_journal())
    url = _checked(url)
    return Store(_postgres(url), url)


def study_names(store: Store) -> list[str]:
    """Names of all sweeps, each with the eight digits of its settings at the end."""
    names = optuna.get_all_study_names(store.storage)
    return sorted(name for name in names if re.fullmatch(r".+-[0-9a-f]{8}", name))


def find_study(store: Store, name: str = "") -> optuna.Study:
    """A sweep by its name, with or without the eight digits; the only one if no name is given.

    Raises:
        InputError: there is none, or there are several.
    """
    names = study_names(store)
    found = [n for n in names if not name or name in (n, n[:-9])]
    if len(found) != 1:
        raise InputError(
            f"sweep {name!r}" if name else store.words,
            found=f"{len(found) or 'no'} sweeps",
            expected=f"one of: {', '.join(found or names) or 'none there yet'}",
            do="Choose one with --name, or start one with `emadapt sweep run`.",
        )
    return optuna.load_study(study_name=found[0], storage=store.storage)


def n_ended(trials: list[FrozenTrial]) -> int:
    """Number of finished and pruned trials: those that count."""
    return sum(trial.state in ENDED for trial in trials)


def best_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial with the highest validation score, the earliest of equals."""
    finished = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    return max(finished, key=lambda t: (t.value, -t.number), default=None)


def first_number(trial: FrozenTrial) -> int:
    """The number a trial had before its process died; it names its checkpoint and its run."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def retry() -> RetryHeartbeatStaleTrialCallback:
    """Queues a lost trial again with the epochs it has reported: its checkpoint goes on after."""
    return RetryHeartbeatStaleTrialCallback(MAX_RETRIES, inherit_intermediate_values=True)


def retry_lost(study: optuna.Study, owner: str = "") -> None:
    """Fail running trials whose process is gone, and queue their settings again.

    Only the trials of `owner` (machine/pid), unless that is empty.
    """
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if owner and trial.user_attrs.get("owner") != owner:
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            continue  # it has ended meanwhile
        retry()(study, trial)


def _journal() -> BaseStorage:
    file = FOLDER / "journal.log"
    # Optuna's own lock outlives a killed process by half a minute; the kernel frees this one.
    lock: Any = FileLock(FOLDER / "journal.log.flock")
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with lock:
            mend_journal(file)
    except (OSError, NotImplementedError) as error:  # some network disks have no locks
        raise InputError(
            FOLDER,
            found=f"a folder that cannot be written or locked ({error})",
            expected="one that can",
            do="Give this user the right to write there, on a disk with file locks.",
        ) from error
    return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))


def mend_journal(file: Path) -> None:
    """Move what follows the last whole entry to `<file>.damaged`; Optuna could not go on.

    A crash or a full disk leaves half a line, or NULs. Entries after a damaged one build on it, so
    they go as well. Nobody may write to the journal meanwhile.
    """
    file.touch()
    content, whole = file.read_bytes(), 0
    for line in io.BytesIO(content):
        if not (line.endswith(b"\n") and _is_json(line)):
            break
        whole += len(line)
    if whole < len(content):
        damaged = file.with_name(f"{file.name}.damaged")
        with damaged.open("ab") as kept:
            kept.write(content[whole:])
        os.truncate(file, whole)
        print(
            f"sweep: {file}: its last {len(content) - whole} bytes are damaged, as after a crash; "
            f"they are in {damaged} now, and the sweep goes on without them"
        )


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _checked(url: str) -> str:
    """The URL with a driver that is installed; an error if it is not one of PostgreSQL."""
    try:
        parsed = make_url(re.sub(r"^postgres://", "postgresql://", url))
        kind = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        kind = ""
    if kind != "postgresql" or "@" in (parsed.host or ""):
        raise InputError(
            "--storage",
            found=repr(redact(re.sub(".*@", "***@", url))),
            expected="postgresql://user:password@host/database, or nothing for a journal file",
            do="Correct it; write an @ in a user's name or password as %40.",
        )
    # SQLAlchemy would look for another driver.
    return parsed.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)


def _postgres(url: str) -> BaseStorage:
    try:
        with _postgres_lock(url, "tables"):  # made by one machine at a time
            return RDBStorage(
                url,
                engine_kwargs={"connect_args": POSTGRES, "pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=retry(),
            )
    except (ImportError, NoSuchModuleError) as error:
        raise InputError(
            redact(url),
            found=f"no driver for it ({error})",
            expected="the package psycopg2-binary",
            do="Run pip install 'emadapt[postgres]'.",
        ) from error
    except (*STORAGE_ERRORS, OSError) as error:
        raise InputError(
            redact(url),
            found=f"a database that cannot be used ({said_by(error.__cause__ or error)})",
            expected="one that answers",
            do="Check host, port, database, user and password, and that it may make tables.",
        ) from error


@contextlib.contextmanager
def _postgres_lock(url: str, name: str) -> Iterator[None]:
    """An advisory lock; it ends with its connection, so a dead machine does not keep it."""
    digest = hashlib.sha256(f"emadapt {name}".encode()).digest()
    key = int.from_bytes(digest[:8], signed=True)
    engine = create_engine(url, poolclass=NullPool, connect_args=POSTGRES)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


def _silence_optuna() -> None:
    """Optuna's notes about experimental features are not for users."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="optuna")
    warnings.filterwarnings("ignore", "Heartbeat of storage")
    warnings.filterwarnings("ignore", "The reported value is ignored")
