"""Folders of slices, one TIFF or PNG file each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.png import has_one_bit, read_png
from emadapt.volumes.source import Array, Choice, Source, only_one, stamp, unlike
from emadapt.volumes.tiff import open_tiff

SLICE_SUFFIXES = (".tif", ".tiff", ".png")
NUMBER = re.compile(r"(?:(?<![^\W_])-)?\d+(?:\.\d+)?")
"""A number in a name, with its decimals, and with a - that stands behind no letter or digit."""


def open_folder(path: Path, choice: Choice) -> Source:
    """The slices of a folder, in the order of their numbers."""
    only_one(path, choice)
    return open_slices(in_order(list_slices(path)), str(path))


def open_slices(files: Sequence[Path], name: str) -> Source:
    """Files in this order as one volume.

    Files of 1 bit a pixel among others are read as 0 and 255 (three of VNC's twenty labels).
    """
    one_bit = [_has_one_bit(file) for file in files]  # looks at every file
    keep_bits = all(one_bit)
    first = _read(files[0], keep_bits)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        wanted = files[z0:z1]
        return np.stack([_alike(_read(f, keep_bits), first, f)[y0:y1] for f in wanted])

    shape = (len(files), *first.shape)
    notes = (f"{len(files)} slices, from {files[0].name} to {files[-1].name}", *gaps(files))
    return Source(name, shape, first.dtype, None, 1, cut, stamp(*files), tuple(files), notes=notes)


def _has_one_bit(file: Path) -> bool:
    """Whether a slice has 1 bit a pixel; refuses a file with several slices."""
    if file.suffix.lower() == ".png":
        return has_one_bit(file)
    with closing(open_tiff(file, Choice())) as source:
        if source.shape[0] > 1:
            raise InputError(
                file,
                found=f"a stack of {source.shape[0]} slices in a folder of slices",
                expected="one slice a file",
                do="Use layout `stack`, or pass the stack itself.",
            )
        return source.dtype == bool


def _read(file: Path, keep_bits: bool) -> Array:
    if file.suffix.lower() == ".png":
        array = read_png(file)
    else:
        with closing(open_tiff(file, Choice())) as source:
            array = np.array(source.read(0, 1)[0])  # no view: the file is closed
    return array.astype(np.uint8) * 255 if array.dtype == bool and not keep_bits else array


def _alike(array: Array, first: Array, file: Path) -> Array:
    if (array.shape, array.dtype) != (first.shape, first.dtype):
        expected = f"{first.shape}, {first.dtype}, as the first"
        raise unlike(file, array.shape, array.dtype, expected)
    return array


def list_slices(folder: Path) -> list[Path]:
    """Image files of a folder, by name; nothing else may be in it."""
    if not folder.is_dir():
        do = "Check the dataset's `layout`."
        raise InputError(folder, found="no such folder", expected="the slices", do=do)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    foreign = [p.name for p in entries if p.suffix.lower() not in SLICE_SUFFIXES or not p.is_file()]
    if foreign:
        raise InputError(
            folder,
            found=some(foreign),
            expected=f"only {', '.join(SLICE_SUFFIXES)} files",
            do="Move everything else out of the folder.",
        )
    if not entries:
        do = "Put the slices there."
        raise InputError(folder, found="an empty folder", expected="one file per slice", do=do)
    for key in (lambda p: p.stem, lambda p: natural(p.stem)):
        times = Counter(map(key, entries))
        if same := [path.name for path in entries if times[key(path)] > 1]:
            raise InputError(
                folder,
                found=f"several files of one slice: {some(same)}",
                expected="one file for each",
                do="Remove the others.",
            )
    return entries


def in_order(files: Sequence[Path]) -> list[Path]:
    """In the natural order of their names.

    Raises:
        InputError: the names can be read in several ways that give different orders.
    """
    orders = {"by name": sorted(files, key=lambda file: natural(file.stem))}
    numbers = {file: n for file in files if (n := number_of(file)) is not None}
    if len(set(numbers.values())) == len(files):
        orders["by the last number"] = sorted(files, key=lambda file: numbers[file])
    decimals = {part.partition(".")[2] for f in files for part in NUMBER.findall(f.stem)} - {""}
    if len({len(d) for d in decimals}) > 1 and any(re.fullmatch(r"\d+0", d) for d in decimals):
        # 1.9 and 1.10: no program writes decimals so
        whole = {file: natural(file.stem.replace(".", "_")) for file in files}
        orders["with points between numbers"] = sorted(files, key=lambda file: whole[file])
    if any(order != orders["by name"] for order in orders.values()):
        listed = [f"{how} {', '.join(f.name for f in o[:4])}, ..." for how, o in orders.items()]
        raise InputError(
            files[0].parent,
            found=f"slices whose order is unclear: {'; '.join(listed)}",
            expected="names with one order",
            do="Rename them so that only the number of the slice differs.",
        )
    return orders["by name"]


def gaps(files: Sequence[Path]) -> list[str]:
    """What is odd about ordered slices: numbers that are left out, and numbers that come twice.

    The number of a slice is the first in which names differ.
    """
    found = [NUMBER.findall(file.stem) for file in files]
    columns = zip(*found, strict=True) if len({len(own) for own in found}) == 1 else ()
    numbers = next(([Decimal(n) for n in c] for c in columns if len(set(c)) > 1), [])
    steps = [after - before for before, after in pairwise(numbers)]
    usual = min(Counter(steps).items(), key=lambda item: (-item[1], item[0]), default=(0, 0))[0]
    pairs = zip(pairwise(files), steps, strict=False)
    wide = [f"{a.name} and {b.name}" for (a, b), step in pairs if step >= 2 * usual > 0]
    said = [f"slices may be missing between {some(wide)}"] if wide else []
    last = Counter(map(number_of, files))
    twice = [file.name for file in files if last[number_of(file)] > 1]
    if 0 < len(twice) < len(files):
        said.append(f"slices of one number: {some(twice)}")
    return said


def number_of(file: Path) -> Decimal | None:
    """The last number in a file's name, if it has one."""
    digits = NUMBER.findall(file.stem)
    return Decimal(digits[-1]) if digits else None


def natural(text: str) -> tuple[tuple[int, Decimal, str], ...]:
    """Sort key under which slice10 comes after slice9."""
    parts = re.split(f"({NUMBER.pattern})", text.casefold())
    return tuple((1, Decimal(p), "") if NUMBER.fullmatch(p) else (0, Decimal(0), p) for p in parts)


def some(items: Sequence[str]) -> str:
    """The first five names of a list, for an error."""
    names = sorted(items, key=natural)
    return "; ".join(names[:5] + [f"and {len(names) - 5} more"] * (len(names) > 5))
