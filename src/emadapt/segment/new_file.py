"""The check that `preview`, `mesh` and `export` make of their one output file, before work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emadapt.errors import InputError


def check_new_file(path: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Check that a file can be written.

    Args:
        path: of the file.
        suffixes: one of which it must have.
        overwrite: it may exist.

    Raises:
        InputError: it has another suffix, its folder does not exist, or it exists.
    """
    if path.suffix.lower() not in suffixes or not path.resolve().parent.is_dir():
        raise InputError(
            path,
            found="a name that cannot be written",
            expected=f"FILE with {', '.join(suffixes)}, in a folder that exists",
            do="Choose another name.",
        )
    if path.exists() and not overwrite:
        raise InputError(
            path, found="a file of that name", expected="none", do="Replace it with --overwrite."
        )
