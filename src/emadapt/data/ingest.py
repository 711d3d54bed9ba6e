"""Ingest: read, pair, check and split one dataset into a memory-mapped volume with a manifest."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.data.foreground import (
    IGNORE,
    class_ids,
    foreground_share,
    masks_of,
    with_boundaries,
)
from emadapt.data.images import WHOLE, write_images
from emadapt.data.label_values import LabelValues
from emadapt.data.layouts import parts_of
from emadapt.data.pairing import Part
from emadapt.data.sources import SYNTHETIC, source_of
from emadapt.data.splits import Split, ends_of, evenly_spaced, runs_of, split_of
from emadapt.data.unversioned import unversioned
from emadapt.errors import InputError
from emadapt.files import new_array, whole_folder, write_json
from emadapt.progress import track
from emadapt.study.datasets import INTERIOR_BOUNDARY, ONE_CLASS, DatasetSettings
from emadapt.study.study import Study
from emadapt.volumes.grey import PERCENTILES, SLICES, Window, grey_window, to_uint8
from emadapt.volumes.source import Array, Source, tell, unlike
from emadapt.volumes.voxel import Voxel, agree, said

INGESTED = Path("build/ingest")
CONTENT = ("shape", "parts", "split", "labelled", "image_md5", "label_md5", "groups")
"""What a manifest's `md5` is of: what models see. Its names and voxel size may change without."""


@dataclass(frozen=True)
class Volume:
    """An ingested dataset: memory-mapped, so that opening it costs nothing.

    Of whole images, each is a slice, perhaps of three channels, and its label is one pixel.
    """

    name: str
    image: npt.NDArray[np.uint8]  # (Z, Y, X)
    label: npt.NDArray[np.uint8]  # (Z, Y, X) of class ids and `IGNORE`; 0 without labels
    manifest: dict[str, Any]  # see `_manifest`

    @property
    def split(self) -> Split:
        return dict(self.manifest["split"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its classes, whose ids in `label` are 1, 2, ..., of whole images 0, 1, ..."""
        return tuple(self.manifest.get("classes", ONE_CLASS))

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the classes that have scores; interior and boundary are one."""
        return ONE_CLASS if self.classes == INTERIOR_BOUNDARY else self.classes

    @property
    def whole_images(self) -> bool:
        """Whether its slices are images with a class each."""
        return self.label.shape[1:] == WHOLE

    @property
    def labelled(self) -> bool:
        """Whether the dataset has labels."""
        return bool(self.manifest.get("labelled", True))

    def truth(self, z: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Masks of slice `z` as `masks_of` gives them, and where the label is known, (Y, X)."""
        label = np.asarray(self.label[z])
        return masks_of(label, len(self.scored)), label != IGNORE

    @property
    def training_images(self) -> list[int]:
        """Training slices, labelled or not."""
        return list(self.manifest.get("training_images", self.split["train"]))

    @property
    def ends(self) -> list[int]:
        """Where each part (`train`, `test`, a volume of many) begins, and the number of slices."""
        parts = self.manifest.get("parts", [["all", len(self.image)]])
        return [0, *itertools.accumulate(n for _, n in parts)]

    @property
    def of_volumes(self) -> bool:
        """Whether its parts are independent volumes."""
        return self.manifest.get("layout") == "volumes"

    def by_part(self, slices: Sequence[int]) -> list[list[int]]:
        """Rising slice numbers, those of each part together."""
        ends = self.ends
        groups = itertools.groupby(slices, lambda z: bisect.bisect(ends, z))
        return [list(own) for _, own in groups]

    def runs(self, part: str) -> list[list[int]]:
        """The slices of `train`, `val` or `test` in runs of neighbours."""
        return runs_of(self.split[part], self.ends)

    @property
    def md5(self) -> str:
        return str(self.manifest["md5"])


def open_volume(name: str, root: Path = INGESTED) -> Volume:
    """Open what `emadapt ingest NAME` wrote.

    Raises:
        InputError: nothing is there.
    """
    folder = root / name
    if not (folder / "manifest.json").is_file():
        raise InputError(
            folder,
            found="no ingested volume",
            expected="manifest.json, image.npy and label.npy",
            do=f"Run `dvc repro ingest@{name}` or `emadapt ingest {name}`.",
        )
    manifest = json.loads((folder / "manifest.json").read_text())
    image, label = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("image", "label"))
    return Volume(name, image, label, manifest)


def ingest(study: Study, name: str, data: Path = Path("data"), out: Path = INGESTED) -> Path:
    """Make the volume of dataset `name`, slice by slice: memory does not grow with z.

    It is read from the dataset's `path`, else from `data`, and written in `out`, complete or not at
    all.

    Raises:
        InputError: anything wrong with the files.
    """
    spec = study.dataset_settings[name]
    root = Path(spec.path) if spec.path else data / name
    if spec.task == "classification":
        with whole_folder(out / name) as folder:
            _write_manifest(folder, write_images(study, name, root, data, folder))
        return out / name
    parts = parts_of(root, spec)
    check_sizes(parts, spec.voxel_nm)
    split = split_of(spec, study.split, parts, str(root))
    windows = _windows(parts, split["train"], spec)
    if len({window[:2] for window in windows}) > 1:
        span = "{:g} to {:g} %".format(*PERCENTILES)
        tell(f"ingest {name}", [f"of each volume, percentiles {span} become 0 to 255"])
    elif windows[0].is_padded or windows[0][:2] != (0, 255):
        tell(f"ingest {name}", [windows[0].words()])
    with whole_folder(out / name) as folder:
        image_md5, label_md5, foreground = _write(folder, parts, spec, windows, name)
        facts = _manifest(study, name, parts, split, windows, root, data)
        facts |= {"image_md5": image_md5, "label_md5": label_md5, "foreground_fraction": {}}
        if spec.labelled:
            _check_foreground(foreground, split["train"], root, spec, name)
            shares = {part: foreground[slices] for part, slices in split.items() if slices}
            facts["foreground_fraction"] = {
                part: round(float(own.mean()), 6) for part, own in shares.items()
            }
        _write_manifest(folder, facts)
    return out / name


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    text = json.dumps({name: facts[name] for name in CONTENT if name in facts}, sort_keys=True)
    md5 = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    write_json(folder / "manifest.json", facts | {"md5": md5})


def check_sizes(parts: Sequence[Part], voxel_nm: Voxel) -> None:
    """Say what is to be known of the files; refuse those with other pixels than the settings.

    The distance of slices may differ, for a stack may hold a part of them.
    """
    notes: dict[str, list[str]] = {}
    for source in (source for part in parts for source in (part.images, part.labels) if source):
        for note in filter(None, (*source.notes, source.doubt)):
            notes.setdefault(note, []).append(source.name)
    for note, names in notes.items():
        tell(names[0] + f" and {len(names) - 1} more" * (len(names) > 1), [note])
    for source in (part.images for part in parts if part.images.voxel_nm):
        stated = source.voxel_nm or voxel_nm
        if not agree(stated[1:], voxel_nm[1:]):
            raise InputError(
                source.name,
                found=f"voxels of {said(stated)} nm",
                expected=f"{said(voxel_nm)} nm, as `voxel_nm` of the dataset says",
                do="Correct `voxel_nm`, or the size in the file (Fiji: Image > Properties).",
            )
        if not agree(stated[:1], voxel_nm[:1]):
            apart = f"{stated[0]:g} nm apart, {voxel_nm[0]:g} nm by the dataset's `voxel_nm`"
            tell(source.name, [f"its slices are {apart}"])


def check_pair(image: Array, label: Array, where: str) -> None:
    """Refuse a label of another size than its image."""
    if image.shape != label.shape:
        found, expected = f"a label of shape {label.shape}", f"{image.shape}, as its image"
        raise InputError(where, found=found, expected=expected, do="Export both at the same size.")


def _windows(parts: Sequence[Part], train: list[int], spec: DatasetSettings) -> list[Window]:
    """What becomes black and white in each part: that of training slices, of volumes their own."""
    images = [part.images for part in parts]
    if spec.of_volumes:  # as in `segment`; MRI has no common scale
        return [
            grey_window(own.slices(evenly_spaced(own.shape[0], SLICES)), own.name) for own in images
        ]
    _check_alike(images)
    some = [train[k] for k in evenly_spaced(len(train), SLICES)]
    return [grey_window(_chosen(images, some), images[0].name)] * len(parts)


def _check_alike(sources: Sequence[Source]) -> None:
    """Refuse volumes whose slices differ in size or type."""
    first = sources[0]
    for source in sources:
        if (source.shape[1:], source.dtype) != (first.shape[1:], first.dtype):
            expected = f"{first.shape[1:]}, {first.dtype}, as in {first.name}"
            raise unlike(source.name, source.shape[1:], source.dtype, expected)


def _chosen(sources: Sequence[Source], numbers: Sequence[int]) -> Iterator[Array]:
    """Slices of these ascending numbers, counted through all volumes."""
    start = 0
    for source in sources:
        inside = range(start, start + source.shape[0])
        yield from source.slices([z - start for z in numbers if z in inside])
        start += source.shape[0]


def _write(
    folder: Path, parts: list[Part], spec: DatasetSettings, windows: list[Window], name: str
) -> tuple[str, str, npt.NDArray[np.float64]]:
    """Check, convert, write and hash: md5 of images, of labels, foreground of each slice.

    Volumes that are smaller than others are mirrored on the far sides, without a label there.
    """
    shape = total, *sides = _shape(parts)
    images = new_array(folder / "image.npy", np.uint8, shape)
    labels = new_array(folder / "label.npy", np.uint8, shape)
    hashes = [hashlib.md5(usedforsecurity=False) for _ in range(2)]
    fractions, ends = np.zeros(total), ends_of(parts)
    missing = set() if isinstance(spec.rule, str) or not spec.labelled else set(spec.rule)
    values = LabelValues(spec)
    with ThreadPoolExecutor(2) as pool:  # reading and hashing let other threads run
        pairs = _ahead(pool, _pairs(parts))
        for z, (image, label, where) in enumerate(track(pairs, f"ingest {name}", total)):
            low, high, _ = windows[bisect.bisect(ends, z) - 1]
            beyond = [(0, n - own) for n, own in zip(sides, image.shape, strict=True)]
            images[z] = np.pad(to_uint8(image, low, high), beyond, mode="symmetric")
            hashing = [pool.submit(hashes[0].update, images[z].data)]
            if label is not None:
                check_pair(image, label, where)
                values.add(label)
                ids = class_ids(label, spec.rules, where, spec.ignore)
                if spec.boundaries:
                    ids = with_boundaries(ids, label, spec.voxel_nm[1])
                labels[z] = np.pad(ids, beyond, constant_values=IGNORE)
                hashing.append(pool.submit(hashes[1].update, labels[z].data))
                missing = {value for value in missing if not (label == value).any()}
                fractions[z] = foreground_share(labels[z])
            for done in hashing:
                done.result()
    tell(f"ingest {name}", values.check(f"labels of {name}"))
    if missing and (fractions.any() or spec.classes):
        raise InputError(
            f"labels of {name}",
            found=f"none with id {', '.join(map(str, sorted(missing)))} in any slice",
            expected=f"all of {list(spec.rule)}{f', {spec.organelle}' if spec.organelle else ''}",
            do="Check the dataset's `classes` or `foreground` against the labels' ids.",
        )
    images.flush()
    labels.flush()
    return hashes[0].hexdigest(), hashes[1].hexdigest(), fractions


def _shape(parts: Sequence[Part]) -> tuple[int, int, int]:
    """(Z, Y, X) of all slices together, as large as the largest."""
    height, width = (max(part.images.shape[axis] for part in parts) for axis in (1, 2))
    return sum(part.depth for part in parts), height, width


Pair = tuple[Array, Array | None, str]
"""Slice, its label if it has one, and what to call the label in an error."""


def _pairs(parts: list[Part]) -> Iterator[Pair]:
    for part in parts:
        images = part.images.slices(range(part.depth))
        if part.labels is None:
            yield from ((image, None, "") for image in images)
            continue
        labels = part.labels.slices(range(part.depth))
        for z, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield image, label, part.labels.where(z)


def _ahead(pool: ThreadPoolExecutor, pairs: Iterator[Pair]) -> Iterator[Pair]:
    """The same, the next being read while one is used."""
    coming = pool.submit(next, pairs, None)
    while (pair := coming.result()) is not None:
        coming = pool.submit(next, pairs, None)
        yield pair


def _check_foreground(
    fractions: npt.NDArray[np.float64],
    train: list[int],
    root: Path,
    spec: DatasetSettings,
    name: str,
) -> None:
    """Refuse training slices without any foreground; say which slices have none, or are full."""
    if fractions[train].sum() == 0:
        raise InputError(
            root,
            found="no foreground in the training slices",
            expected=f"labels with values {spec.rule}",
            do="Check the labels and the dataset's `classes` or `foreground`.",
        )
    tell(f"ingest {name}", empty_or_full(fractions, range(len(fractions))))


def empty_or_full(fractions: npt.NDArray[np.float64], numbers: Sequence[int]) -> list[str]:
    """Lines on slices of these numbers without foreground, as lost labels look, or of nothing else.

    `fractions` are those of the foreground.
    """
    lines = []
    for extreme, words in ((0, "without foreground"), (1, "without background")):
        if len(found := np.flatnonzero(fractions == extreme)):
            named = ", ".join(str(numbers[k]) for k in found[:10])
            more = ", ..." if len(found) > 10 else ""
            lines.append(f"{len(found)} of {len(fractions)} slices {words}: {named}{more}")
    return lines


def _manifest(
    study: Study,
    name: str,
    parts: list[Part],
    split: Split,
    windows: list[Window],
    root: Path,
    data: Path,
) -> dict[str, Any]:
    """What is known of a dataset before it is written."""
    spec = study.dataset_settings[name]
    spans = [window[:2] for window in windows]
    low, high = spans[0] if len(set(spans)) == 1 else map(list, zip(*spans, strict=True))
    facts = {
        "name": name,
        "shape": list(_shape(parts)),
        "dtype": "uint8",
        "source_dtype": str(parts[0].images.dtype),
        "voxel_nm": list(spec.voxel_nm),
        "layout": spec.layout,
        "pairing": spec.pairing,
        "foreground": spec.rule,
        "intensity": {"low": low, "high": high, "percentiles": list(PERCENTILES)},
        "parts": [[part.name, part.depth] for part in parts],
        "split": split,
        "split_kind": study.split.kind,
        "pairs": _names(parts, root),
        "labelled": spec.labelled,
        "source": dict(SYNTHETIC) if spec.synthetic else source_of(root),
        "unversioned": "" if spec.synthetic else unversioned(root, data),
    }
    several = list(spec.class_names) if len(spec.class_names) > 1 else []
    stated = {"classes": several, "organelle": spec.organelle, "ignore": list(spec.ignore)}
    return facts | {name: value for name, value in stated.items() if value}


def _names(parts: list[Part], root: Path) -> list[list[str]]:
    """The file of each slice, with its number in a stack, and that of its label."""

    def name(source: Source, z: int) -> str:
        if not source.files:
            return source.where(z)
        single = len(source.files) == source.shape[0]
        path = source.files[z if single else 0].relative_to(root).as_posix()
        return path if single or z == 0 else f"{path}#{z}"

    return [
        [name(source, z) for source in (part.images, part.labels) if source is not None]
        for part in parts
        for z in range(part.depth)
    ]
