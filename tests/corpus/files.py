"""Ways to make a file of a case."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

GREY = np.random.default_rng(0).integers(0, 256, (3, 24, 32), dtype=np.uint8)
Write = Callable[[Path], Path | str]
"""Makes a case in a folder; gives what is to be opened."""


def written(name: str, content: bytes) -> Write:
    """A file of these bytes."""
    return made(name, lambda path: path.write_bytes(content))


def made(name: str, make: Callable[[Path], object]) -> Write:
    """Whatever a function makes at a path."""

    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


def link(target: str, name: str = "a.tif") -> Write:
    return made(name, lambda path: os.symlink(target, path))


def noise(n: int) -> bytes:
    return np.random.default_rng(1).bytes(n)


def flipped(content: bytes, at: int) -> bytes:
    """With one byte inverted."""
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def zeros(n: int) -> bytes:
    """`n` MiB of zeros, deflated: one block that stands for itself, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", n * 2**20 % 65521, 1)  # Adler-32 of zeros
    return b"\x78\x9c" + block * n + b"\x03\0" + checksum


def pickle_that_touches(path: Path) -> bytes:
    """A pickle, written by hand, that creates a file when it is loaded."""
    return b"cposix\nsystem\n(S'touch " + str(path).encode() + b"'\ntR."
