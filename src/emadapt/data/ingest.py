"""Ingest: read, pair, validate and split one dataset into a canonical memory-mapped volume with a manifest."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from emadapt.data.pairing import Part, SliceRef, find_parts
from emadapt.data.splits import Split, split_slices
from emadapt.errors import InputError
from emadapt.files import new_array
from emadapt.study.study import DatasetSettings, Study
from emadapt.volumes.slices import (
    PERCENTILES,
    Array,
    foreground_mask,
    grey_window,
    read_slice,
    to_uint8,
)

INGESTED = Path("build/ingest")


@dataclass(frozen=True)
class Volume:
    """An ingested dataset: memory-mapped, so that opening it costs nothing.

    Attributes:
        image: (Z, Y, X) uint8.
        label: (Z, Y, X) uint8, 0 background and 1 foreground; of a dataset without labels 0 throughout, which means nothing.
        manifest: what `ingest` wrote: shape, voxel size, md5s, split, foreground fractions, intensity mapping, pairs.
    """

    name: str
    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    manifest: dict[str, Any]

    @property
    def split(self) -> Split:
        return dict(self.manifest["split"])

    @property
    def labelled(self) -> bool:
        """Whether `label` is one."""
        return bool(self.manifest.get("labelled", True))

    @property
    def training_images(self) -> list[int]:
        """Training slices, labelled or not: what needs no labels may look at all of them."""
        return list(self.manifest.get("training_images", self.split["train"]))

    @property
    def ends(self) -> list[int]:
        """Where the volumes that lie one after the other (`train`, `test`) begin, and the number of all slices."""
        return [
            0,
            *itertools.accumulate(
                n for _, n in self.manifest.get("parts", [["all", len(self.image)]])
            ),
        ]

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
    return Volume(
        name,
        np.load(folder / "image.npy", mmap_mode="r"),
        np.load(folder / "label.npy", mmap_mode="r"),
        manifest,
    )


def ingest(study: Study, name: str, data: Path = Path("data"), out: Path = INGESTED) -> Path:
    """Make the canonical volume of dataset `name` under `out`; slice by slice, so memory does not grow with z.

    Of a dataset without labels (`labelled: false`) every slice is a training slice, since nothing is validated or tested on it.

    Returns:
        The folder written, complete or not at all.

    Raises:
        InputError: anything wrong with the files, named; see `emadapt.data.pairing` and `emadapt.volumes.slices`.
    """
    spec = study.dataset_settings[name]
    root = Path(spec.path) if spec.path else data / name
    parts = find_parts(root, spec.layout, spec.pairing, labelled=spec.labelled)
    images = [r for p in parts for r in p.images]
    labels = [r for p in parts for r in p.labels]
    split = split_of(study, name, parts, str(root))
    low, high, dtype = _intensity(images, split["train"])
    folder = out / name
    temporary = out / f".{name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        facts = _write(temporary, images, labels, spec, (low, high))
        per_slice = facts.pop("per_slice")
        foreground = (
            {k: round(float(per_slice[v].mean()), 6) for k, v in split.items()}
            if spec.labelled
            else {}
        )
        if spec.labelled and per_slice[split["train"]].sum() == 0:
            raise InputError(
                root,
                found="no foreground in the training slices",
                expected=f"labels with values {spec.rule}",
                do="Check the labels and the dataset's `organelle` or `foreground` rule.",
            )
        if spec.labelled and len(
            empty := np.flatnonzero(per_slice == 0)
        ):  # labels that are lost look like this
            numbers = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            click.echo(
                f"ingest {name}: {len(empty)} of {len(per_slice)} slices without foreground: {numbers}",
                err=True,
            )
        manifest = {
            "name": name,
            "shape": facts["shape"],
            "dtype": "uint8",
            "source_dtype": dtype,
            "voxel_nm": list(spec.voxel_nm),
            "layout": spec.layout,
            "pairing": spec.pairing,
            "foreground": spec.rule,
            "intensity": {"low": low, "high": high, "percentiles": list(PERCENTILES)},
            "parts": [[p.name, len(p.images)] for p in parts],
            "split": split,
            "split_kind": study.split.kind,
            "foreground_fraction": foreground,
            "image_md5": facts["image_md5"],
            "label_md5": facts["label_md5"],
            "pairs": _pairs(parts, root),
            **({"organelle": spec.organelle} if spec.organelle else {}),
            **({} if spec.labelled else {"labelled": False}),
        }
        manifest["md5"] = hashlib.md5(
            json.dumps(manifest, sort_keys=True).encode(), usedforsecurity=False
        ).hexdigest()
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def split_of(study: Study, name: str, parts: list[Part], what: str) -> Split:
    """Training, validation and test slices of a dataset; `what` names it in an error (see `split_slices`)."""
    sizes, spec = [(p.name, len(p.images)) for p in parts], study.dataset_settings[name]
    if not spec.labelled:
        return {"train": list(range(sum(n for _, n in sizes))), "val": [], "test": []}
    return split_slices(sizes, study.split, spec.voxel_nm[0], what)


def _intensity(images: list[SliceRef], train: list[int]) -> tuple[float, float, str]:
    """The grey values that become 0 and 255, from the training slices; and the dtype."""
    low, high = grey_window((read_slice(images[z]) for z in train), images[0].path)
    return low, high, str(read_slice(images[0]).dtype)


def _write(
    folder: Path,
    images: list[SliceRef],
    labels: list[SliceRef],
    spec: DatasetSettings,
    window: tuple[float, float],
) -> dict[str, Any]:
    """One pass over the slices: check, convert, write both arrays and hash them."""
    from rich.progress import track

    first = read_slice(images[0])
    shape = (len(images), *first.shape)
    image_out = new_array(folder / "image.npy", np.uint8, shape)
    label_out = new_array(folder / "label.npy", np.uint8, shape)
    hashes = {
        "image": hashlib.md5(usedforsecurity=False),
        "label": hashlib.md5(usedforsecurity=False),
    }
    per_slice, missing = (
        np.zeros(len(images)),
        set(spec.rule) if labels and not isinstance(spec.rule, str) else set(),
    )
    name, numbers = folder.name.strip(".").removesuffix(".part"), range(len(images))
    with ThreadPoolExecutor(2) as pool:  # reading lets other threads run, and so does hashing
        for z, (image, label) in zip(
            track(numbers, description=f"ingest {name}"), _ahead(pool, images, labels), strict=True
        ):
            _check_slice(image, first, images[z], images[0])
            kept = to_uint8(image, *window)
            if label is None:
                image_out[z] = kept
                hashes["image"].update(np.ascontiguousarray(kept).data)
                continue
            _check_pair(image, label, images[z], labels[z])
            mask = foreground_mask(label, spec.rule, str(labels[z].path))
            hashing = [
                pool.submit(hashes["image"].update, np.ascontiguousarray(kept).data),
                pool.submit(hashes["label"].update, mask.data),
            ]
            image_out[z], label_out[z] = kept, mask
            missing = {value for value in missing if not (label == value).any()}
            per_slice[z] = np.count_nonzero(mask) / mask.size
            for done in hashing:
                done.result()
    if missing and (per_slice.any() or spec.organelle):
        raise InputError(
            labels[0].path,
            found=f"labels without id {', '.join(map(str, sorted(missing)))} in any slice",
            expected=f"all of {list(spec.rule)}{f', {spec.organelle}' if spec.organelle else ''}",
            do="Check the dataset's `organelles` or `foreground` against the labels' ids.",
        )
    image_out.flush()
    label_out.flush()
    return {
        "shape": list(shape),
        "per_slice": per_slice,
        **{f"{k}_md5": h.hexdigest() for k, h in hashes.items()},
    }


def _ahead(
    pool: ThreadPoolExecutor, images: list[SliceRef], labels: list[SliceRef]
) -> Iterator[tuple[Array, Array | None]]:
    """Slices with their labels, if there are any, the next being read while one is used."""

    def read(z: int) -> tuple[Array, Array | None]:
        return read_slice(images[z]), read_slice(labels[z]) if labels else None

    coming = pool.submit(read, 0)
    for z in range(1, len(images)):
        pair, coming = coming.result(), pool.submit(read, z)
        yield pair
    yield coming.result()


def _check_pair(image: Array, label: Array, image_ref: SliceRef, label_ref: SliceRef) -> None:
    if image.shape != label.shape:
        raise InputError(
            label_ref.path,
            found=f"a label of shape {label.shape}",
            expected=f"{image.shape}, as its image {image_ref.path.name}",
            do="Export both at the same size.",
        )


def _check_slice(image: Array, first: Array, image_ref: SliceRef, first_ref: SliceRef) -> None:
    if image.shape != first.shape or image.dtype != first.dtype:
        raise InputError(
            image_ref.path,
            found=f"a slice of shape {image.shape}, {image.dtype}",
            expected=f"{first.shape}, {first.dtype}, as {first_ref.path.name}",
            do="Crop or pad all slices of a dataset to one shape, or make it two datasets.",
        )


def _pairs(parts: list[Part], root: Path) -> list[list[str]]:
    def name(ref: SliceRef) -> str:
        return ref.path.relative_to(root).as_posix() + (f"#{ref.page}" if ref.page else "")

    pairs = [
        zip(p.images, p.labels, strict=True) if p.labels else ((i,) for i in p.images)
        for p in parts
    ]
    return [[name(ref) for ref in refs] for several in pairs for refs in several]
