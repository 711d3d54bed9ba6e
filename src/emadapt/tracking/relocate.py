"""Where the store is, and how it follows a checkout that was moved.

MLflow keeps absolute paths of artifacts. After a move it would show nothing and write to the old
place.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote, unquote

from emadapt.errors import InputError
from emadapt.tracking.redact import redact

SQLITE = "sqlite:///"
LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""Where MLflow keeps absolute paths: a column by table."""


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if set (a relative sqlite path counts from the root), else mlflow.db.

    The default is where a plain `mlflow ui` in the root looks.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}/"):
        return f"{SQLITE}{quote(str(root.resolve()))}/{uri.removeprefix(SQLITE)}"
    return uri


def _database(uri: str) -> Path:
    """The file of a sqlite address, in which SQLAlchemy wants `?` and `%` as `%3F` and `%25`."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def moved(root: Path) -> str | None:
    """The root before a move or a copy: experiments keep their artifacts outside this root."""
    root = root.resolve()
    file = root / "mlflow.db"
    if _database(tracking_uri(root)) != file or not file.is_file():
        return None
    try:
        uri = f"file:{quote(str(file))}?mode=ro"
        with sqlite3.connect(uri, uri=True, timeout=5) as database:
            rows = database.execute(
                "SELECT artifact_location FROM experiments WHERE experiment_id != 0"
            ).fetchall()
    except sqlite3.Error:
        return None  # not created yet, or locked: opening it will tell
    for (place,) in rows:
        path = place or ""
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://"))
        if path.startswith("/") and "/mlruns/" in path and not path.startswith(f"{root}/"):
            return str(path[: path.rindex("/mlruns/")])
    return None


def relocate(root: Path, old_root: str) -> int:
    """Make the artifacts of a checkout that was moved from `old_root` found again: all, or none.

    Returns:
        How many locations were rewritten.

    Raises:
        InputError: the store is not a local database, or there is none.
    """
    uri = tracking_uri(root)
    file = _database(uri)
    if not uri.startswith("sqlite:") or not file.is_file():
        raise InputError(
            redact(uri),
            found="no database file",
            expected="the local database of a checkout that was moved",
            do="Run it in the moved checkout.",
        )
    old, new = old_root.rstrip("/"), str(root.resolve())
    prefixes = ((old, new), (f"file://{quote(old)}", f"file://{quote(new)}"))
    count, database = 0, sqlite3.connect(file, timeout=30)
    try:
        with database:  # one transaction
            for table, column in LOCATIONS.items():
                rows = database.execute(f"SELECT DISTINCT {column} FROM {table}")  # noqa: S608
                change = f"UPDATE {table} SET {column} = ? WHERE {column} = ?"  # noqa: S608
                for (value,) in rows.fetchall():
                    for before, after in prefixes:
                        if changed := _moved_path(value, before, after):
                            count += database.execute(change, (changed, value)).rowcount
    finally:
        database.close()
    return count


def _moved_path(value: str, before: str, after: str) -> str:
    """A location below the new root instead of the old one; empty if it is not to be changed."""
    if not f"{value}/".startswith(f"{before}/"):
        return ""
    # Moved into itself (/a to /a/b): what is right already must not become /a/b/b.
    if after.startswith(f"{before}/") and f"{value}/".startswith(f"{after}/"):
        return ""
    return after + value[len(before) :]
