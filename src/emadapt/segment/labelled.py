"""Which slices of a volume have labels, for `emadapt tune`: a folder of slices, or a stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.volumes.folder import list_slices, number_of, open_slices, some
from emadapt.volumes.opening import open_onto
from emadapt.volumes.source import Source, tell
from emadapt.volumes.zarrs import is_zarr


def labelled(source: Source, labels: Path, slices: Sequence[int]) -> tuple[Source, dict[int, int]]:
    """The labels of a volume, and which of them each labelled slice has, rising.

    Args:
        source: the volume.
        labels: a folder of labelled slices, see `paired`; or a stack of the volume's shape.
        slices: those that are labelled in a stack, counted from 0; none: those with any label.

    Raises:
        InputError: see `paired`; a stack has another shape, or fewer than two labelled slices.
    """
    if labels.is_dir() and not is_zarr(labels):
        files = paired(source, labels)
        return open_slices([*files.values()], str(labels)), {z: k for k, z in enumerate(files)}
    stack = open_onto(str(labels), source)
    tell(stack.name, stack.notes)
    depth = source.shape[0]
    if stack.shape != source.shape:
        found, expected = f"shape {stack.shape}", f"{source.shape}, as the volume"
        do = "Save all slices of the volume, or those with labels in a folder, with their numbers."
        raise InputError(labels, found=found, expected=expected, do=do)
    numbers = sorted({*slices}) or [z for z in range(depth) if stack.read(z, z + 1).any()]
    if len(numbers) < 2 or numbers[-1] >= depth:
        found, expected = f"labelled slices {numbers}", f"two or more of 0 to {depth - 1}"
        do = "Label another slice, or correct --slice."
        raise InputError(labels, found=found, expected=expected, do=do)
    return stack, {z: z for z in numbers}


def paired(source: Source, labels: Path) -> dict[int, Path]:
    """The label file of each labelled slice, by slice, rising.

    The last number in a file's name is that of the slice: of the file in a folder of slices, else
    counted from 0.

    Raises:
        InputError: a label has no number or no slice, or two have one number; all are listed.
    """
    of_files = len(source.files) == source.shape[0] > 1
    numbers = [number_of(file) for file in source.files] if of_files else range(source.shape[0])
    slices: dict[Any, int] = {number: z for z, number in enumerate(numbers) if number is not None}
    found: dict[int, Path] = {}
    odd = [] if len(slices) == source.shape[0] else ["slices without a number of their own"]
    for file in list_slices(labels):
        number = number_of(file)
        z = None if number is None else slices.get(number)
        if z is None:
            odd.append(f"{file.name} has no slice")
        elif z in found:
            odd.append(f"{file.name} and {found[z].name} have one number")
        else:
            found[z] = file
    if odd or len(found) < 2:
        counted = "as the files of the volume have" if of_files else f"0 to {source.shape[0] - 1}"
        raise InputError(
            labels,
            found=some(odd) if odd else f"{len(found)} labelled slices",
            expected=f"two or more, each with the number of its slice ({counted})",
            do="Rename or remove the files, or label another slice.",
        )
    return dict(sorted(found.items()))
