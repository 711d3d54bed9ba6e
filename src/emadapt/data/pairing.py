"""Which label belongs to which image. Pairing is strict: every image has exactly one label, found by a stated rule.

The reference study's script paired by position in two sorted lists where stems did not match, which for Lucchi++ gives
most slices another slice's label. Here that rule exists only by name (`lexicographic`), to replicate it; on a part of Lucchi++,
`lexicographic_165` mispairs as far, in shares of the volume, as the rule does on the whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from emadapt.errors import InputError
from emadapt.volumes.stacks import SUFFIXES

IMAGE_SUFFIXES = (".tif", ".tiff", ".png")
STACK_SUFFIXES = (".tif", ".tiff", ".ome.tif", ".ome.tiff", *SUFFIXES)


@dataclass(frozen=True)
class SliceRef:
    """One slice: page `page` of `path` (0 in a file of one page)."""

    path: Path
    page: int = 0


@dataclass(frozen=True)
class Part:
    """A volume with its labels, if it has any: `train`, `test`, or `all` where the split has yet to make them."""

    name: str
    images: tuple[SliceRef, ...]
    labels: tuple[SliceRef, ...]


def find_parts(root: Path, layout: str, pairing: str, *, labelled: bool = True) -> list[Part]:
    """Pair the files of a dataset's folder.

    Args:
        root: the dataset's folder.
        layout: `lucchi` (Train_In/Train_Out/Test_In/Test_Out), `vnc` (raw/mitochondria), `folders` (images/labels) or
            `stack` (image and label, each with a suffix of `STACK_SUFFIXES`); the last two directly in `root`, or in both
            `root`/train and `root`/test.
        pairing: `number` (the last number in the file's name), `stem` (equal names but for the suffix), `lexicographic` or
            `lexicographic_165`; stacks pair page by page.
        labelled: False: images alone, in the order that `pairing` gives them; label files are not looked for.

    Returns:
        One part per volume, slices in the order of z.

    Raises:
        InputError: a folder or file is missing, empty or unpaired.
    """
    if not root.is_dir():
        raise InputError(
            root,
            found="no such folder",
            expected=f"a dataset in layout `{layout}`",
            do="Run `dvc pull`, or `emadapt fetch` for a public dataset.",
        )
    folders = _pair_folders if labelled else _images_alone
    if layout == "lucchi":
        return [
            folders(n.lower(), root / f"{n}_In", root / f"{n}_Out", pairing)
            for n in ("Train", "Test")
        ]
    if layout == "vnc":
        return [folders("all", root / "raw", root / "mitochondria", pairing)]
    places = [("all", root)]
    if (root / "train").is_dir() or (root / "test").is_dir():
        places = [("train", root / "train"), ("test", root / "test")]
    if layout == "folders":
        return [
            folders(name, folder / "images", folder / "labels", pairing) for name, folder in places
        ]
    return [_pair_stack(name, folder, labelled=labelled) for name, folder in places]


def _stack(folder: Path, kind: str) -> tuple[SliceRef, ...]:
    """The slices of the one volume called `kind`."""
    from emadapt.volumes.slices import count_slices

    found = [p for p in (folder / f"{kind}{s}" for s in STACK_SUFFIXES) if p.exists()]
    if len(found) != 1:
        raise InputError(
            folder,
            found=f"{len(found)} volumes called {kind} with {', '.join(STACK_SUFFIXES)}",
            expected="exactly one",
            do=f"Put the {kind} stack there.",
        )
    return tuple(SliceRef(found[0], page) for page in range(count_slices(found[0])))


def _pair_stack(name: str, folder: Path, *, labelled: bool) -> Part:
    images = _stack(folder, "image")
    if not labelled:
        return Part(name, images, ())
    labels = _stack(folder, "label")
    if len(images) != len(labels):
        raise InputError(
            labels[0].path,
            found=f"{len(labels)} slices",
            expected=f"{len(images)}, as {images[0].path.name} has",
            do="Give every slice of the image a slice of labels (empty where nothing is labelled).",
        )
    return Part(name, images, labels)


def _pair_folders(name: str, image_dir: Path, label_dir: Path, pairing: str) -> Part:
    images, labels = list_slices(image_dir), list_slices(label_dir)
    if (
        pairing == "lexicographic"
    ):  # the reference's fallback, mistakes included; zip drops what is left over
        pairs = list(zip(sorted(images, key=str), sorted(labels, key=str), strict=False))
        return Part(
            name, tuple(SliceRef(i) for i, _ in pairs), tuple(SliceRef(lab) for _, lab in pairs)
        )
    if pairing == "lexicographic_165":
        labels = sorted(labels, key=_number)
        pairs = list(
            zip(
                sorted(images, key=_number),
                (labels[k] for k in _as_of_165(len(images), len(labels))),
                strict=True,
            )
        )
        return Part(
            name, tuple(SliceRef(i) for i, _ in pairs), tuple(SliceRef(lab) for _, lab in pairs)
        )
    by_image, by_label = _by_key(images, pairing), _by_key(labels, pairing)
    lonely = [f"{by_image[k].name} has no label" for k in by_image.keys() - by_label.keys()]
    lonely += [f"label {by_label[k].name} has no image" for k in by_label.keys() - by_image.keys()]
    if lonely:
        raise InputError(
            label_dir,
            found=_some(lonely),
            expected=f"one label per image of {image_dir}, paired by {pairing}",
            do="Add the missing files, remove the extra ones, or set the dataset's `pairing`.",
        )
    order = _in_z(by_image, pairing)
    return Part(
        name,
        tuple(SliceRef(by_image[k]) for k in order),
        tuple(SliceRef(by_label[k]) for k in order),
    )


def _images_alone(name: str, image_dir: Path, _: Path, pairing: str) -> Part:
    by_image = _by_key(list_slices(image_dir), pairing)
    return Part(name, tuple(SliceRef(by_image[k]) for k in _in_z(by_image, pairing)), ())


def _in_z(by_image: dict, pairing: str) -> list:
    """Keys of the images in the order of z."""
    return sorted(
        by_image,
        key=lambda k: (_number(by_image[k]), k) if pairing == "number" else natural(str(k)),
    )


def _as_of_165(images: int, labels: int) -> list[int]:
    """Label of each image as the lexicographic order of 165 numbers gives it, Lucchi++'s slices, scaled to fewer slices.

    The order of 64 numbers is much milder: most labels are 3 to 10 slices off, against 74 of 165 in the mean.
    """
    order = sorted(range(165), key=str)
    places = [round(i * 164 / max(images - 1, 1)) for i in range(images)]
    return [round(order[p] * (labels - 1) / 164) for p in places]


def list_slices(folder: Path) -> list[Path]:
    """Image files of a folder, by name; an error where anything else is in it, or nothing."""
    if not folder.is_dir():
        raise InputError(
            folder,
            found="no such folder",
            expected="the slices",
            do="Check the dataset's `layout`.",
        )
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(
            folder,
            found=f"cannot be read ({error.strerror})",
            expected="a readable folder",
            do="Check its permissions.",
        ) from None
    foreign = [p.name for p in entries if p.suffix.lower() not in IMAGE_SUFFIXES or not p.is_file()]
    if foreign:
        raise InputError(
            folder,
            found=_some(foreign),
            expected=f"only {', '.join(IMAGE_SUFFIXES)} files",
            do="Move everything else out of the folder.",
        )
    if not entries:
        raise InputError(
            folder,
            found="an empty folder",
            expected="one file per slice",
            do="Put the slices there.",
        )
    return entries


def _by_key(paths: list[Path], pairing: str) -> dict:
    """Files by what `pairing` goes by: their number, or their stem."""
    out: dict = {}
    for path in paths:
        if (k := _number(path) if pairing == "number" else path.stem) in out:
            raise InputError(
                path.parent,
                found=f"{out[k].name} and {path.name}, which both read as {k!r}",
                expected="one file per slice",
                do="Remove one, or set the dataset's `pairing`.",
            )
        out[k] = path
    return out


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    if not digits:
        raise InputError(
            path,
            found="no number in the file's name",
            expected="the slice's number",
            do="Rename it, or set the dataset's `pairing: stem`.",
        )
    return int(digits[-1])


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which slice10 comes after slice9."""
    parts = re.split(r"(\d+)", text)
    return tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts)


def _some(items: list[str], most: int = 5) -> str:
    items = sorted(items, key=natural)
    return "; ".join(items[:most]) + (
        f"; and {len(items) - most} more" if len(items) > most else ""
    )
