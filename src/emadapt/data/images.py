"""Datasets of whole images with a class each: where the files are, the split, the ingested array.

The files are in a folder for each class, or in a table `images.csv`. An ingested dataset is a
volume whose slices are the images, at one size; the label of a slice is one pixel.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from emadapt.data.layouts import check_folder
from emadapt.data.sources import source_of
from emadapt.data.splits import Split, evenly_spaced
from emadapt.data.unversioned import unversioned
from emadapt.errors import InputError
from emadapt.files import new_array
from emadapt.progress import track
from emadapt.study.datasets import ImagesSettings, SplitSettings
from emadapt.study.study import Study
from emadapt.volumes.grey import SLICES, grey_window, to_uint8
from emadapt.volumes.png import check_single
from emadapt.volumes.source import Array, check_finite, tell, unreadable

T = TypeVar("T")

TABLE = "images.csv"
GREY = ("L", "I;16", "I;16B", "I", "F")
"""Pillow's modes of images that are taken as they are."""
WHOLE = (1, 1)
"""Shape of the label of a whole image."""
PARTS = ("train", "val", "test")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
"""What images are read, by ending; another program would open what else Pillow takes."""


class Labelled(NamedTuple):
    """An image of a dataset."""

    file: Path
    label: str
    group: str
    """Images of one group, such as a patient, are in the same part of the split."""
    part: str
    """`train`, `val` or `test` if the dataset says so; else empty."""


def find_images(root: Path) -> list[Labelled]:
    """The images of a dataset, from `images.csv` if it is there, else from folders.

    The table has columns `file` (in the dataset's folder) and `label`, perhaps `group` and
    `split`. Folders are CLASS/, or train/CLASS/ and test/CLASS/, perhaps val/CLASS/.

    Raises:
        InputError: no folder or images, a class alone, or a column or file that is not there.
    """
    check_folder(root, "images")
    found = list(_of_table(root) if (root / TABLE).is_file() else _of_folders(root))
    if len(classes := _classes(found)) < 2:
        raise InputError(
            root,
            found=f"{len(found)} images of {len(classes)} classes",
            expected=f"a folder of images for each class, or {TABLE}; at least two classes",
            do="See 'Whole images' in docs/your-own-data.md.",
        )
    return found


def split_images(images: Sequence[Labelled], spec: SplitSettings, root: Path) -> Split:
    """Numbers of the images of each part; a part that the dataset does not name is drawn.

    Groups are drawn whole, of each class the same share.

    Raises:
        InputError: a group is in two parts, or a part lacks a class.
    """
    rng = np.random.default_rng(spec.seed)
    parts, labels = dict[str, str](), dict[str, str]()
    for image in images:
        labels.setdefault(image.group, image.label)  # a group of several counts as its first
        if parts.setdefault(image.group, image.part) != image.part:
            found = f"group {image.group} in parts {parts[image.group]!r} and {image.part!r}"
            raise InputError(root, found=found, expected="one part", do="Correct `split`.")
    for part, share in (("test", spec.test), ("val", spec.val)):
        if part in parts.values():
            continue
        free = ("", "train") if part == "val" else ("",)
        for label in _classes(images):
            groups = [g for g, now in parts.items() if now in free and labels[g] == label]
            for k in rng.permutation(len(groups))[: max(1, round(share * len(groups)))]:
                parts[groups[k]] = part
    split = {
        part: [n for n, image in enumerate(images) if (parts[image.group] or "train") == part]
        for part in PARTS
    }
    for part, numbers in split.items():
        if lacking := set(labels.values()) - {images[n].label for n in numbers}:
            found = f"no image of {', '.join(sorted(lacking))} in {part}"
            do = "Add images or groups of that class, or leave the split to emadapt."
            raise InputError(root, found=found, expected="every class in every part", do=do)
    return split


def write_images(study: Study, name: str, root: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Write image.npy, (n, side, side) or with three channels, and label.npy, (n, 1, 1).

    Images are resized to squares. 8 bits stay as they are; of other grey values percentiles of
    training images become 0 and 255.

    Returns:
        The manifest, see `ingest._manifest`, without `md5`; with `classes` and `groups`.

    Raises:
        InputError: anything wrong with the files.
    """
    spec = study.dataset_settings[name]
    assert isinstance(spec, ImagesSettings)
    images = find_images(root)
    split, classes = split_images(images, study.split, root), _classes(images)
    dtype, low, high = _grey_values(images, split["train"], root)
    coloured = any(_opened(image.file, _is_coloured) for image in images)
    shape = (len(images), spec.side, spec.side, *([3] if coloured else []))
    pixels = new_array(folder / "image.npy", np.uint8, shape)
    for n, image in enumerate(track(images, f"ingest {name}", len(images))):
        array = read_image(image.file)
        if array.dtype != dtype:
            found, expected = str(array.dtype), f"{dtype}, as of other images"
            raise InputError(image.file, found=found, expected=expected, do="Export all alike.")
        pixels[n] = square(to_uint8(array, low, high), spec.side, coloured)
    pixels.flush()
    if twice := [images[n].file.name for n in _in_two_parts(pixels, split)]:
        shown = ", ".join(twice[:5]) + ", ..." * (len(twice) > 5)
        tell(f"ingest {name}", [f"{len(twice)} images are in another part as well: {shown}"])
    labels = np.array([classes.index(image.label) for image in images], np.uint8)
    np.save(folder / "label.npy", labels.reshape(-1, *WHOLE))
    md5 = [hashlib.md5(a.data, usedforsecurity=False).hexdigest() for a in (pixels, labels)]
    groups = {group: n for n, group in enumerate(dict.fromkeys(i.group for i in images))}
    return {
        "name": name,
        "shape": list(shape),
        "dtype": "uint8",
        "source_dtype": str(dtype),
        "voxel_nm": list(spec.voxel_nm),
        "layout": spec.layout,
        "pairing": "",
        "classes": classes,
        "groups": [groups[image.group] for image in images],
        "intensity": {"low": low, "high": high},
        "parts": [["all", len(images)]],
        "split": split,
        "pairs": [[image.file.relative_to(root).as_posix()] for image in images],
        "labelled": True,
        "source": source_of(root),
        "unversioned": unversioned(root, data),
        "image_md5": md5[0],
        "label_md5": md5[1],
    }


def _grey_values(
    images: Sequence[Labelled], train: Sequence[int], root: Path
) -> tuple[np.dtype[Any], float, float]:
    """Type of the images' values, and which of them become 0 and 255."""
    some = [read_image(images[train[k]].file) for k in evenly_spaced(len(train), SLICES)]
    if some[0].dtype == np.uint8:
        return some[0].dtype, 0.0, 255.0
    low, high, _ = grey_window(some, root)
    return some[0].dtype, low, high


def _in_two_parts(pixels: npt.NDArray[np.uint8], split: Split) -> Iterator[int]:
    """Numbers of images that another part of the split has before them."""
    place = {n: part for part, numbers in split.items() for n in numbers}
    seen: dict[bytes, str] = {}
    for n, own in enumerate(pixels):
        content = hashlib.md5(own.data, usedforsecurity=False).digest()
        if seen.setdefault(content, place[n]) != place[n]:
            yield n


def read_image(path: Path) -> Array:
    """Pixels, (Y, X) grey values or (Y, X, 3) of 8 bits; transparency is dropped.

    Raises:
        InputError: it is no image that can be read, or has values that are not finite.
    """
    pixels = _opened(path, _pixels)
    check_finite(pixels, str(path))
    return pixels


def _pixels(image: Any) -> Array:
    if image.mode in (*GREY, "RGB"):
        array = np.asarray(image)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.asarray(image.convert("L" if image.mode in ("1", "LA") else "RGB"))


def _is_coloured(image: Any) -> bool:
    return image.mode not in (*GREY, "1", "LA")


def _opened(path: Path, look: Callable[[Any], T]) -> T:
    """What `look` gives of an image of Pillow."""
    from PIL import Image

    try:
        with Image.open(path, formats=(FORMATS[path.suffix.lower()],)) as image:
            check_single(path, image)
            return look(image)
    except InputError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError, ...
        raise unreadable(path, "no readable image", error) from error


def square(image: npt.NDArray[np.uint8], side: int, coloured: bool) -> npt.NDArray[np.uint8]:
    """A square of `side` pixels, bicubic; grey values three times if others have colours."""
    from PIL import Image

    shown = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(shown.convert("RGB") if coloured else shown)


def _classes(images: Sequence[Labelled]) -> list[str]:
    """Their names, sorted; the number in this list is the class of an image."""
    return sorted({image.label for image in images})


def _of_folders(root: Path) -> Iterator[Labelled]:
    parts = [part for part in PARTS if (root / part).is_dir()]
    for part in parts or [""]:
        for folder in filter(Path.is_dir, _not_hidden(root / part)):
            for file in _not_hidden(folder):
                if file.suffix.lower() in FORMATS:
                    yield Labelled(file, folder.name, str(file), part)


def _not_hidden(folder: Path) -> list[Path]:
    """What is in a folder, without what macOS and Jupyter keep there."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _of_table(root: Path) -> Iterator[Labelled]:
    lines: dict[Path, int] = {}
    with (root / TABLE).open(newline="", encoding="utf-8-sig") as opened:  # Excel marks UTF-8
        table = csv.DictReader(opened)
        for number, row in enumerate(table, 2):
            # `..` is taken out by name: what is there may be links into DVC's cache.
            file = Path(os.path.normpath(root / (row.get("file") or "")))
            part = row.get("split") or ""
            odd = ""
            if not row.get("label"):
                odd = "no label"
            elif file.suffix.lower() not in FORMATS or not file.is_file():
                odd = f"file {row.get('file')!r}, which is not there or no image"
            elif not file.is_relative_to(os.path.normpath(root)):
                odd = f"file {row.get('file')!r}, which is outside of the dataset's folder"
            elif part not in ("", *PARTS):
                odd = f"split {part!r}"
            elif (first := lines.setdefault(file, number)) != number:
                odd = f"file {row.get('file')!r}, which line {first} has as well"
            if odd:
                expected = f"a file ({', '.join(FORMATS)}), a label, and a split of {PARTS} or none"
                where = f"{root / TABLE}, line {number}"
                raise InputError(where, found=odd, expected=expected, do="Correct the table.")
            yield Labelled(file, row["label"], row.get("group") or str(file), part)
