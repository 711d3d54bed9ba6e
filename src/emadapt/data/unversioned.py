"""Raw data that DVC does not follow: outside of data/, or behind a link to a folder.

DVC neither copies such files nor sees them change. So `ingest` keeps their hashes, and `check` and
`plan` compare.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from emadapt.errors import InputError
from emadapt.files import remembered_sha256
from emadapt.study.keys import digest
from emadapt.study.study import Study

DATA = Path("data")


def unversioned(root: Path, data: Path = DATA) -> str:
    """Hash of the names and contents of a dataset's files that DVC does not follow.

    Args:
        root: the dataset's folder.
        data: what DVC follows.

    Returns:
        Empty if DVC follows all of them.
    """
    files = sorted(_files(root, followed=root.resolve().is_relative_to(data.resolve())))
    hashes = remembered_sha256(files)
    named = {path.relative_to(root).as_posix(): hashes[path] for path in files}
    return digest(named) if named else ""


def _files(folder: Path, *, followed: bool) -> Iterator[Path]:
    """Files in a folder, or, of one that DVC follows, those behind links to folders."""
    for entry in os.scandir(folder):
        path = folder / entry.name
        if entry.is_dir():
            yield from _files(path, followed=followed and not entry.is_symlink())
        elif not followed:
            yield path


def check_unchanged(study: Study, name: str, manifest: Path, data: Path = DATA) -> None:
    """Compare files that DVC does not follow with those that were ingested, if both are there.

    Args:
        study: the study.
        name: the dataset.
        manifest: what `ingest` wrote about it.
        data: what DVC follows.

    Raises:
        InputError: they have changed.
    """
    root = Path(study.dataset_settings[name].path or data / name)
    if not root.is_dir() or not manifest.is_file():
        return
    now = unversioned(root, data)
    if now and now != json.loads(manifest.read_text()).get("unversioned"):
        again = f"dvc repro --force --single-item ingest@{name}"
        raise InputError(
            root,
            found="other files than were ingested, in a place that DVC does not follow",
            expected="the same files",
            do=f"Put them back, or read them again: `{again}`.",
        )
