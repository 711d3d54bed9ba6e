"""Files that are there whole or not at all, and errors of the disk in words that help."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from emadapt.errors import InputError

if TYPE_CHECKING:
    import numpy as np

BLOCK = 2**24
"""Bytes that have a checksum of their own."""

HASHES = Path("scratch/hashes.json")
"""Sha256 of files by path, size and time of change, since large ones take seconds to read."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# numpy, torch and safetensors tell of the disk in words of their own, without a number.
_SAID_FULL = re.compile(
    r"os error (28|122|27)\b|\d+ requested and \d+ written|PytorchStreamWriter failed"
    r"|inline_container.*unexpected pos"
)
_SAID_REFUSED = re.compile(
    r"os error (1|13|30)\b|Parent directory .* does not exist|cannot be opened"
)


def checkout_of(folder: Path) -> Path:
    """The checkout that a folder belongs to: itself, unless DVC has copied it from there.

    `dvc exp run --temp` and `--queue` run stages in a copy in `.dvc/tmp/exps` of the checkout, and
    remove it afterwards.
    """
    folder = folder.resolve()
    copies = (parent for parent in folder.parents if parent.parts[-3:] == (".dvc", "tmp", "exps"))
    copy = next(copies, None)
    return copy.parents[2] if copy else folder


def share_scratch() -> None:
    """In a copy that DVC made, use the scratch/ of the checkout, which outlives the copy."""
    checkout, own = checkout_of(Path()), Path("scratch")
    if checkout != Path().resolve() and not own.exists():
        (checkout / own).mkdir(exist_ok=True)
        own.symlink_to(checkout / own)


def cache(name: str) -> Path:
    """Folder for what can be had again: scratch/NAME of a project (a folder with params.yaml).

    Anywhere else it is in the user's cache, so that a current folder may be read-only.
    """
    if Path("params.yaml").is_file():
        return Path("scratch") / name
    from pooch import os_cache

    return Path(os_cache("emadapt")) / name


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes its name at the end, or is removed after an error."""
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, resumed: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; at the end it replaces what is at `path`, if anything.

    It is empty, or with `resumed` as it was left when the work was stopped, other than by an
    InputError.
    """
    temporary, old = (path.with_name(f".{path.name}.{ending}") for ending in ("part", "old"))
    if not resumed:
        shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException as error:
        if not resumed or isinstance(error, InputError):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text: it is there whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as a PNG that says nothing of when and with what it was made."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def check_new_file(path: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Check, before work, that a file of one of these suffixes can be written.

    Raises:
        InputError: it has another suffix, it exists, or there is no folder that it may be put in.
    """
    parent = path.resolve().parent
    if path.suffix.lower() not in suffixes or not (parent.is_dir() and os.access(parent, os.W_OK)):
        expected = f"FILE with {', '.join(suffixes)}, in a folder that can be written to"
        raise InputError(
            path, found="a name that cannot be written", expected=expected, do="Choose another."
        )
    if path.exists() and not overwrite:
        raise InputError(
            path, found="a file of that name", expected="none", do="Replace it with --overwrite."
        )


def read_json(path: Path, *, expected: str, do: str) -> dict[str, Any]:
    """What a JSON file has, which another stage wrote.

    Raises:
        InputError: it is missing, or no JSON object.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        found = "no file" if isinstance(error, FileNotFoundError) else f"no JSON ({error})"
        raise InputError(path, found=found, expected=expected, do=do) from error


def file_md5(path: Path) -> str:
    """Md5 of a file, as DVC and MLflow's tags name it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def sha256_of(path: Path) -> str:
    """Sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(paths: Sequence[Path]) -> dict[Path, str]:
    """Sha256 of files, remembered until their size or time of change is another."""
    facts = {path: path.stat() for path in paths}
    keys = {p: f"{p.resolve()} {was.st_size} {was.st_mtime_ns}" for p, was in facts.items()}
    known = _hashes()
    if new := {key: sha256_of(path) for path, key in keys.items() if key not in known}:
        HASHES.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(HASHES.with_suffix(".lock")):  # other stages note theirs
            known |= _hashes() | new
            write_json(HASHES, known)
    return {path: known[key] for path, key in keys.items()}


def _hashes() -> dict[str, str]:
    try:
        return dict(json.loads(HASHES.read_text()))
    except (OSError, ValueError):
        return {}


def checksums(folder: Path) -> dict[str, list[int]]:
    """CRC-32 of each `BLOCK` bytes of the arrays in a folder, by file name."""
    facts = {file: file.stat() for file in sorted(folder.glob("*.npy"))}
    return {f.name: _checksums(f, was.st_size, was.st_mtime_ns) for f, was in facts.items()}


@functools.cache
def _checksums(path: Path, size: int, changed: int) -> list[int]:
    """Each file is read once in a process, unless it has changed since."""
    with path.open("rb") as file, ThreadPoolExecutor() as pool:

        def checksum(start: int) -> int:
            return zlib.crc32(os.pread(file.fileno(), BLOCK, start))

        return list(pool.map(checksum, range(0, size, BLOCK)))


def is_sound(folder: Path) -> bool:
    """Whether the arrays in a folder are those of which its manifest.json has the checksums."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return bool(manifest["checksums"] == checksums(folder))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array in a .npy file, mapped, to be filled.

    Its room is reserved (OSError if there is none): writing on a full disk would be a SIGBUS.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def disk_error(error: BaseException) -> InputError | None:
    """A full disk or a refused file in words that help; None for other errors."""
    number, said = getattr(error, "errno", None), f"{type(error).__name__}: {error}"
    worded = number is None and (isinstance(error, OSError | RuntimeError) or "Safetensor" in said)
    what = Path(getattr(error, "filename", None) or Path.cwd())
    if number in FULL or (worded and _SAID_FULL.search(said)):
        found, expected = "a full disk", "room to write"
    elif number in (errno.EACCES, errno.EPERM) and what.exists() and not os.access(what, os.R_OK):
        found, expected = "no permission to read", "a file that can be read"
    elif number in REFUSED or (worded and _SAID_REFUSED.search(said)):
        found, expected = "no permission to write", "permission to write"
    else:
        return None
    return InputError(
        what,
        found=f"{found} ({' '.join(str(error).split())[:200]})",
        expected=expected,
        do="See to it and repeat the command: what is done is kept.",
    )
