"""Files that are there whole or not at all, and what a disk says that takes no more."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emadapt.errors import InputError

if TYPE_CHECKING:
    import numpy as np

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SAID_FULL = re.compile(
    r"os error (28|122|27)\b|\d+ requested and \d+ written|PytorchStreamWriter failed|inline_container.*unexpected pos"
)
_SAID_REFUSED = re.compile(
    r"os error (1|13|30)\b|Parent directory .* does not exist|cannot be opened"
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename: it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array in a .npy file, mapped, to be filled.

    Its room is reserved: a full disk is an error here, where otherwise writing to the array would end the process (SIGBUS).

    Raises:
        OSError: there is no room for it.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def disk_error(error: BaseException) -> InputError | None:
    """A full disk, or one that may not be written to, in words that help; None for other errors.

    numpy, torch and safetensors say it in words of their own, without a number.
    """
    number, said = getattr(error, "errno", None), f"{type(error).__name__}: {error}"
    library = isinstance(error, OSError | RuntimeError) or "Safetensor" in said
    if number in FULL or (number is None and library and _SAID_FULL.search(said)):
        found = "a full disk"
    elif number in REFUSED or (number is None and library and _SAID_REFUSED.search(said)):
        found = "no permission to write"
    else:
        return None
    what = getattr(error, "filename", None) or Path.cwd()
    return InputError(
        what,
        found=f"{found} ({' '.join(str(error).split())[:200]})",
        expected="room and permission to write",
        do="See to it and repeat the command: what is done is kept.",
    )
