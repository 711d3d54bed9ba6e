"""Which label belongs to which image. Pairing is strict: every image has exactly one label.

The reference study's script pairs files by position in two sorted lists where their stems do not
match, which for Lucchi++ gives most slices another slice's label. That rule exists here only by
name (`lexicographic`), to measure its effect. On a part of Lucchi++, `lexicographic_165` mispairs
as far, in shares of the volume, as the rule does on the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from emadapt.errors import InputError
from emadapt.volumes.folder import in_order, list_slices, number_of, open_slices, some
from emadapt.volumes.opening import FORMATS, open_onto, open_source
from emadapt.volumes.source import Source, as_image

STACK_SUFFIXES = (".ome.tif", ".ome.tiff", ".ome.zarr", *(s for s in FORMATS if s != ".png"))


@dataclass(frozen=True)
class Part:
    """A volume, slices in the order of z, with its labels unless the dataset has none."""

    name: str  # `train`, `test`, or `all` where the split has yet to make them
    images: Source
    labels: Source | None  # as many slices

    @property
    def depth(self) -> int:
        """Number of slices."""
        return self.images.shape[0]


def slices_part(
    name: str, image_dir: Path, label_dir: Path, pairing: str, *, labelled: bool
) -> Part:
    """A folder of image slices with a folder of label slices, ignored unless `labelled`."""
    files = list_slices(image_dir)
    images, labels = PAIRINGS[pairing](files, list_slices(label_dir) if labelled else files)
    opened = as_image(open_slices(images, str(image_dir)))
    return Part(name, opened, open_slices(labels, str(label_dir)) if labelled else None)


def stack_part(name: str, folder: Path, *, labelled: bool) -> Part:
    """The volume called `image` and the one called `label` in a folder, paired by slice."""
    return _of_files(name, *(_stack(folder, kind) for kind in ("image", "label")[: 1 + labelled]))


def volume_parts(name: str, image_dir: Path, label_dir: Path, *, labelled: bool) -> list[Part]:
    """A part for each volume of a folder; its label has the same name in the other folder."""
    files = _volumes(image_dir)
    images, labels = _by(_bare, "name")(files, _volumes(label_dir) if labelled else files)
    pairs = zip(images, labels, strict=True) if labelled else ((image,) for image in images)
    return [_of_files(name, *pair) for pair in pairs]


def _of_files(name: str, image: Path, label: Path | None = None) -> Part:
    """A volume and its label, paired by slice."""
    images = as_image(open_source(str(image)))
    if label is None:
        return Part(name, images, None)
    labels = open_onto(str(label), images)
    if images.shape[0] != labels.shape[0]:
        raise InputError(
            labels.files[0],
            found=f"{labels.shape[0]} slices",
            expected=f"{images.shape[0]}, as {images.files[0].name} has",
            do="Give every slice of the image a slice of labels (empty where there is nothing).",
        )
    return Part(name, images, labels)


def _volumes(folder: Path) -> list[Path]:
    """The volumes of a folder; nothing else may be in it."""
    entries = [path for path in folder.glob("*") if not path.name.startswith(".")]
    foreign = [path.name for path in entries if not path.name.endswith(STACK_SUFFIXES)]
    if foreign or not entries:
        raise InputError(
            folder,
            found=some(foreign) if foreign else "no volumes",
            expected=f"only volumes ({', '.join(STACK_SUFFIXES)}), each with a label of its name",
            do="Check the dataset's `layout`, and move everything else out of the folder.",
        )
    return entries


def _bare(path: Path) -> str:
    """The name of a volume without its suffixes."""
    return next(path.name.removesuffix(s) for s in STACK_SUFFIXES if path.name.endswith(s))


def _stack(folder: Path, kind: str) -> Path:
    candidates = {folder / f"{kind}{suffix}" for suffix in STACK_SUFFIXES}
    found = [path for path in candidates if path.exists()]
    if len(found) != 1:
        raise InputError(
            folder,
            found=some([path.name for path in found or folder.glob("*")]) or "nothing",
            expected=f"one volume called {kind} with {', '.join(STACK_SUFFIXES)}",
            do="Keep one of them." if found else f"Put the {kind} there under this name.",
        )
    return found[0]


Key = Decimal | str
Files = list[Path]


def _number(path: Path) -> Key:
    number = number_of(path)
    if number is None:
        raise InputError(
            path,
            found="no number in the file's name",
            expected="the slice's number",
            do="Rename it, or set the dataset's `pairing: stem`.",
        )
    return number


def _stem(path: Path) -> Key:
    return path.stem


def _by_key(paths: Files, key: Callable[[Path], Key]) -> dict[Key, Path]:
    """Files by what they are paired by; no two may have the same."""
    found: dict[Key, Path] = {}
    for path in paths:
        other = found.setdefault(key(path), path)
        if other != path:
            raise InputError(
                path.parent,
                found=f"{other.name} and {path.name}, which both read as {key(path)}",
                expected="one file per slice",
                do="Remove one, or set the dataset's `pairing`.",
            )
    return found


def _by(key: Callable[[Path], Key], called: str) -> Callable[[Files, Files], tuple[Files, Files]]:
    """Pairing by a key that both files have in common."""

    def pair(images: Files, labels: Files) -> tuple[Files, Files]:
        by_image, by_label = _by_key(images, key), _by_key(labels, key)
        lonely = [f"{by_image[k].name} has no label" for k in by_image.keys() - by_label.keys()]
        alone = by_label.keys() - by_image.keys()
        lonely += [f"label {by_label[k].name} has no image" for k in alone]
        if lonely:
            raise InputError(
                labels[0].parent,
                found=some(lonely),
                expected=f"one label per image of {images[0].parent}, paired by {called}",
                do="Add the missing files, remove the extra ones, or set the dataset's `pairing`.",
            )
        ordered = in_order(images)
        return ordered, [by_label[key(image)] for image in ordered]

    return pair


def _as_text(images: Files, labels: Files) -> tuple[Files, Files]:
    """By position in two lists sorted as text: wrong, on purpose; what is left over is dropped."""
    n = min(len(images), len(labels))
    return sorted(images, key=str)[:n], sorted(labels, key=str)[:n]


def _as_text_of_165(images: Files, labels: Files) -> tuple[Files, Files]:
    """The mistake that `_as_text` makes on Lucchi++'s 165 slices, scaled to fewer.

    Text order of fewer numbers is milder: of 64, most labels are 3 to 10 slices off.
    """
    order = sorted(range(165), key=str)
    images, labels = sorted(images, key=_number), sorted(labels, key=_number)
    places = [round(i * 164 / max(len(images) - 1, 1)) for i in range(len(images))]
    return images, [labels[round(order[place] * (len(labels) - 1) / 164)] for place in places]


PAIRINGS: dict[str, Callable[[Files, Files], tuple[Files, Files]]] = {
    "number": _by(_number, "number"),
    "stem": _by(_stem, "stem"),
    "lexicographic": _as_text,
    "lexicographic_165": _as_text_of_165,
}
"""(Images, labels) -> the same in the order of z, label i belonging to image i."""
