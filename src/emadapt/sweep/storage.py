"""Where a sweep is kept: a journal file for one machine, PostgreSQL for several. And the lock under which trials are claimed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from emadapt.errors import InputError
from emadapt.tracking.store import redact

FOLDER = Path("scratch/sweeps")
HEARTBEAT, GRACE = (
    10,
    60,
)  # s: how often a trial in PostgreSQL says that it lives; after how much silence it counts as dead
# A machine that lost its power holds no lock for longer than about 25 s, and one that does not answer is not waited for.
POSTGRES = {
    "connect_timeout": 5,
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
}

STORAGE_ERRORS = (
    optuna.exceptions.StorageInternalError,
    SQLAlchemyError,
)  # the storage's trouble, not a trial's

Requeue = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]


@dataclass(frozen=True)
class Store:
    """An open storage.

    Attributes:
        storage: Optuna's.
        url: empty for the journal.
        shared: several machines may work on it at once.
    """

    storage: BaseStorage
    url: str
    shared: bool

    @property
    def words(self) -> str:
        """Where it is, without a password."""
        return redact(self.url) or str(FOLDER / "journal.log")

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process of all machines at a time, and let go when that process dies, however it does.

        PostgreSQL: an advisory lock that ends with its transaction. Else: a locked file.
        """
        if not self.shared:
            with FileLock(FOLDER / f"{name}.lock"):
                yield
            return
        with _postgres_lock(self.url, name):
            yield

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """On the journal, one `sweep run` per sweep at a time: then a trial that runs when it starts has lost its process.

        Raises:
            InputError: another one runs.
        """
        if self.shared:
            yield
            return
        lock = FileLock(FOLDER / f"{name}.run.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            do = "Use more --workers there; for several machines give a PostgreSQL --storage."
            raise InputError(
                f"sweep {name}",
                found="another `emadapt sweep run` at work on it",
                expected="one at a time",
                do=do,
            ) from None
        try:
            yield
        finally:
            lock.release()


def open_store(url: str = "", workers: int = 1, requeue: Requeue | None = None) -> Store:
    """Open a storage, making its tables where they are missing.

    Args:
        url: empty for scratch/sweeps/journal.log, else postgresql://user:password@host/database, or sqlite:///file.db.
        workers: that will write to it from this machine.
        requeue: called with a trial whose machine fell silent.

    Raises:
        InputError: no such kind of storage, sqlite for several workers, a database that does not answer or cannot be written.
    """
    quiet()
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        # Optuna's own lock, journal.log.lock, outlives a killed process by half a minute; this one does not.
        lock: Any = FileLock(FOLDER / "journal.log.flock")
        with lock, (FOLDER / "journal.log").open("ab"):  # a missing right to write shows here
            pass
    except (OSError, NotImplementedError) as error:  # some network disks have no locks
        raise InputError(
            FOLDER,
            found=f"a folder that cannot be written or locked ({error})",
            expected="one that can",
            do="Give this user the right to write there; take a disk with file locks.",
        ) from error
    if not url:
        backend = JournalFileBackend(str(FOLDER / "journal.log"), lock_obj=lock)
        return Store(JournalStorage(backend), "", shared=False)
    url, kind = _known(url)
    if kind == "sqlite":
        if workers > 1:
            raise InputError(
                redact(url),
                found=f"sqlite for {workers} workers",
                expected="one worker: it loses others",
                do="Leave --storage out (a journal file), or give a PostgreSQL URL.",
            )
        return Store(_reach(url, lambda: RDBStorage(url)), url, shared=False)
    return Store(_reach(url, lambda: _postgres(url, requeue)), url, shared=True)


def quiet() -> None:
    """Optuna says much about features that may change; it goes to the log books instead."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="optuna")
    warnings.filterwarnings("ignore", "Heartbeat of storage")
    warnings.filterwarnings("ignore", "The reported value is ignored")


def _known(url: str) -> tuple[str, str]:
    """The URL with a driver that is installed, and its kind."""
    expected = "postgresql://user:password@host/database, sqlite:///file.db for one worker, or none for a journal"
    try:
        parsed = make_url(re.sub(r"^postgres://", "postgresql://", url))
        kind = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        raise InputError(
            "--storage",
            found=f"{re.sub('.*@', '***@', url)!r}, which is no URL",
            expected=expected,
            do="Correct it.",
        ) from None
    if "@" in (parsed.host or ""):
        raise InputError(
            "--storage",
            found="a URL with two @",
            expected="one, between password and host",
            do="Write an @ in a user's name or password as %40.",
        )
    if kind not in ("postgresql", "sqlite"):
        raise InputError(
            "--storage", found=f"a URL of kind {kind!r}", expected=expected, do="Correct it."
        )
    if parsed.drivername == "postgresql":
        parsed = parsed.set(
            drivername="postgresql+psycopg2"
        )  # SQLAlchemy would look for another one
    return parsed.render_as_string(hide_password=False), kind


def _reach(url: str, connect: Callable[[], BaseStorage]) -> BaseStorage:
    try:
        return connect()
    except (ModuleNotFoundError, ImportError, NoSuchModuleError) as error:
        raise InputError(
            redact(url),
            found=f"no driver for it ({error})",
            expected="the package psycopg2-binary",
            do="Run pip install 'emadapt[postgres]'.",
        ) from error
    except (*STORAGE_ERRORS, OSError) as error:
        reason = redact(
            (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        )
        raise InputError(
            redact(url),
            found=f"a database that cannot be used ({reason})",
            expected="one that answers",
            do="Check host, port, database, user and password, and that it may make tables.",
        ) from error


def _postgres(url: str, requeue: Requeue | None) -> BaseStorage:
    with _postgres_lock(
        url, "tables"
    ):  # two machines that make the tables at once get in each other's way
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": POSTGRES, "pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=requeue,
        )


@contextlib.contextmanager
def _postgres_lock(url: str, name: str) -> Iterator[None]:
    key = int.from_bytes(hashlib.sha256(f"emadapt {name}".encode()).digest()[:8], signed=True)
    engine = create_engine(url, poolclass=NullPool, connect_args=POSTGRES)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


def sweep_names(store: Store) -> list[str]:
    """Names of the sweeps in a storage, each with the eight digits of its definition at the end."""
    return sorted(
        n for n in optuna.get_all_study_names(store.storage) if re.fullmatch(r".+-[0-9a-f]{8}", n)
    )


def find_sweep(store: Store, name: str) -> str:
    """The full name of a sweep.

    Raises:
        InputError: there is none of that name.
    """
    names = sweep_names(store)
    found = [n for n in names if n == name or n[:-9] == name]
    if not found:
        have = ", ".join(n[:-9] for n in names) or "none"
        raise InputError(
            f"sweep {name!r}",
            found=f"no such sweep in {store.words}",
            expected=f"one of: {have}",
            do="Start it with `emadapt sweep run`.",
        )
    return found[0]


def open_sweep(
    store: Store,
    name: str,
    space_hash: str,
    definition: dict[str, Any],
    data: dict[str, str],
    trials: int,
) -> tuple[optuna.Study, bool]:
    """The sweep `name`, begun where it is not there.

    Args:
        store: where.
        name: without the hash.
        space_hash, definition: of `emadapt.sweep.space`: the settings that all its trials share.
        data: md5 of each dataset of the training set.
        trials: how many it is to end with.

    Returns:
        The study, and whether it is new.

    Raises:
        InputError: a sweep of this name was begun with other settings or on other data.
    """
    full = f"{name}-{space_hash}"
    with store.lock(name):
        others = [n for n in sweep_names(store) if n[:-9] == name and n != full]
        if others:
            was = optuna.load_study(study_name=others[0], storage=store.storage).user_attrs.get(
                "definition", {}
            )
            raise InputError(
                f"sweep {name!r} in {store.words}",
                found=f"one with {difference(was, definition)}",
                expected="the search space and settings that it was begun with",
                do="Put them back, or begin another sweep with --name.",
            )
        study = optuna.create_study(
            study_name=full, storage=store.storage, direction="maximize", load_if_exists=True
        )
        new = "trials" not in study.user_attrs  # written last
        if not new and (was := study.user_attrs.get("data")) != data:
            do = "Bring that data back (`dvc checkout`, `dvc repro`), or begin another sweep with --name."
            raise InputError(
                f"sweep {name!r} in {store.words}",
                found=f"trials on data {was}",
                expected=f"data {data}",
                do=do,
            )
        if new:
            study.set_user_attr("definition", definition)
            study.set_user_attr("data", data)
        study.set_user_attr("trials", trials)
    return study, new


def difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The first settings that are not the same, as `train.epochs 3 there, 5 here`; another unit before what follows from it."""
    flat_was, flat_now = _flat(was), _flat(now)
    keys = [k for k in {**flat_was, **flat_now} if flat_was.get(k) != flat_now.get(k)]
    keys.sort(key=lambda k: ".unit." not in k)
    said = [
        f"{k.split('.', 1)[1]} {flat_was.get(k, 'absent')} there, {flat_now.get(k, 'absent')} here"
        for k in keys[:3]
    ]
    return "; ".join(said) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    return {
        k: v
        for key, inner in value.items()
        for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }
