"""A model fitted to a user's own volume: without labels (`adapt`), or with a few (`tune`).

Both make a small study of the volume in OUT.partial and train its one unit as `emadapt train` does.
A run that was stopped goes on when the command is repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from emadapt.data.ingest import INGESTED, check_pair, ingest
from emadapt.data.splits import evenly_spaced
from emadapt.data.tiles import Grey
from emadapt.errors import InputError
from emadapt.files import write_json, write_text
from emadapt.segment.job import window_for
from emadapt.segment.model import Model, find_model, open_model, sha256_of, zoom_for
from emadapt.segment.partial import clear, held
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import (
    INTERIOR_BOUNDARY,
    DatasetSettings,
    SplitSettings,
    TrainSetSettings,
)
from emadapt.study.regimes import GradientRegime
from emadapt.study.study import Study, dumped
from emadapt.study.training import TrainSettings
from emadapt.training.model_card import model_card
from emadapt.training.model_files import regime_from
from emadapt.training.prepare import prepare
from emadapt.training.tracked import UNITS
from emadapt.training.train import train_unit
from emadapt.training.validate import validate
from emadapt.volumes.folder import list_slices, number_of, open_slices, some
from emadapt.volumes.grey import to_uint8
from emadapt.volumes.opening import open_source
from emadapt.volumes.source import Source, tell, voxel_of
from emadapt.volumes.voxel import Voxel
from emadapt.volumes.zarrs import is_zarr

SLICES, SIDE = 32, 1024
"""Slices of a volume that are learned from without labels, and pixels of their sides, at most."""
DOMAINS = 24
"""Synthetic domains whose labels keep `adapt` from forgetting what a mitochondrion is."""
GOLDEN = 0.7548776662466927, 0.5698402909980532
"""Steps of a sequence that covers a square evenly (Roberts 2018, R2)."""
APART_NM = 30.0
"""Labelled slices that are so far apart need no gap between training and validation."""
TRAIN = TrainSettings(
    epochs=6, steps_per_epoch=40, head_lr=3e-4, adapter_lr=1e-4, warmup_steps=20, val_slices=0
)


@dataclass(frozen=True)
class Own:
    """A volume, the model to start from, and where the new one goes; see `emadapt adapt --help`."""

    volume: str
    model: str
    output: Path
    scale: int = 0
    voxel_nm: Voxel | None = None
    window: tuple[float, float] | None = None
    overwrite: bool = False

    @cached_property
    def source(self) -> Source:
        return open_source(str(Path(self.volume).absolute()), self.scale)

    @cached_property
    def start(self) -> Model:
        return open_model(find_model(self.model).resolve())

    @cached_property
    def voxel(self) -> Voxel:
        return voxel_of(self.source, self.voxel_nm)

    @cached_property
    def zoom(self) -> tuple[float, float]:
        """Factors (y, x) to the pixel size of the model."""
        return zoom_for(self.start, self.voxel)[1]

    @cached_property
    def grey(self) -> tuple[float, float]:
        """The grey values that become 0 and 255, as `segment` takes them."""
        return window_for(self.source, self.window)

    @property
    def name(self) -> str:
        """Of the dataset."""
        stem = Path(self.volume.partition(":")[0]).name.partition(".")[0]
        return re.sub(r"\W", "_", stem, flags=re.ASCII) or "volume"

    @property
    def consecutive(self) -> bool:
        """Whether the model sees neighbouring slices together."""
        return bool(self.start.segmenter.spec.context) or self.start.segmenter.depth > 1

    @cached_property
    def spec(self) -> BackboneSettings:
        """The model's backbone; pixels and grey values come to what it was trained on."""
        spec = self.start.segmenter.spec
        resampled = self.zoom != (1.0, 1.0)
        return spec.changed(
            views=1,
            pixel_nm=spec.pixel_nm or (self.voxel[1] / self.zoom[0] if resampled else 0.0),
            reference=str(self.start.folder) if spec.reference else "",
            file=str(Path(spec.file).resolve()) if spec.file else "",
        )

    @cached_property
    def regime(self) -> GradientRegime:
        """Settings of the model's regime."""
        kind = regime_from(self.start.card).settings
        if not isinstance(kind, GradientRegime):
            found, expected = f"a model of kind {kind.kind}", "one that is trained in steps"
            raise InputError(self.model, found=found, expected=expected, do="Take another model.")
        return kind

    def read(self, z: int, y: int = 0, x: int = 0, size: tuple[int, int] | None = None) -> Grey:
        """A part of a slice, 8 bits."""
        height, width = size or self.source.shape[1:]
        rows = self.source.read(z, z + 1, y, y + height)[0]
        return to_uint8(rows[:, x : x + width], *self.grey)


def adapt(own: Own) -> str:
    """Learn from the volume's images alone; gives what is odd about the result, if anything.

    Raises:
        InputError: the volume or the model does not suit, or OUT exists.
    """
    if len(own.start.segmenter.classes) > 1:
        found, do = "a model of several classes", "Label a few slices, and use `emadapt tune`."
        raise InputError(own.model, found=found, expected="one of one class", do=do)
    data = Path("data", own.name)
    with _workplace(own, "adapt", []):
        if not (data / "voxel.json").is_file():
            data.mkdir(parents=True, exist_ok=True)
            parts, spacing = _sample(own)
            tifffile.imwrite(data / "image.tif", parts, photometric="minisblack")
            write_json(data / "voxel.json", [spacing, *own.voxel[1:]])
        voxel = tuple(json.loads((data / "voxel.json").read_text()))
        pixel = own.spec.pixel_nm or own.voxel[1]
        synthetic = DatasetSettings(
            layout="synthetic", voxel_nm=(own.voxel[0], pixel, pixel), domains=DOMAINS
        )
        images = DatasetSettings(layout="stack", voxel_nm=voxel, labelled=False)
        datasets = {"synthetic": synthetic, own.name: images}
        train_set = TrainSetSettings(datasets=("synthetic",), unlabelled=(own.name,))
        split = SplitSettings(gap_nm=0.0)  # validation chooses nothing here
        study = _study(own, "adapted", datasets, train_set, split, self_training=1.0)
        # No label says where to cut, so the model's own threshold stays.
        card = _train(own, study, threshold=own.start.card["threshold"])
    return str(card.get("check", ""))


def tune(own: Own, labels: Path, foreground: str = ">0", slices: Sequence[int] = ()) -> str:
    """Learn from a few labelled slices; gives what validation says.

    Args:
        own: the volume and the model.
        labels: see `labelled`.
        foreground: label values to segment, `>N`. For a model of several classes labels have the
            ids of its masks instead, 1 for its first class.
        slices: those that are labelled in a stack.

    Raises:
        InputError: the volume, the labels or the model does not suit, or OUT exists.
    """
    if own.consecutive:
        found = "one that looks at neighbouring slices, which have no labels here"
        do = "Take another model, or train in a study (docs/your-own-data.md)."
        raise InputError(own.model, found=found, expected="a model of single slices", do=do)
    opened, places = labelled(own.source, labels.absolute(), slices)
    data = Path("data", own.name)
    with _workplace(own, "tune", [opened.stamp, [*places], foreground]):
        for part in ("images", "labels"):
            (data / part).mkdir(parents=True, exist_ok=True)
        for z, k in places.items():
            image, label = own.read(z), opened.read(k, k + 1)[0]
            check_pair(image, label, opened.where(k))
            for part, array in (("images", image), ("labels", label)):
                tifffile.imwrite(data / part / f"{z:06d}.tif", array, photometric="minisblack")
        voxel = (float(np.diff([*places]).min()) * own.voxel[0], *own.voxel[1:])
        settings = DatasetSettings(
            layout="folders", voxel_nm=voxel, **_meaning(own.start.segmenter.classes, foreground)
        )
        gap = 0.0 if voxel[0] >= APART_NM else APART_NM
        train_set = TrainSetSettings(datasets=(own.name,))
        split = SplitSettings(val=0.2, gap_nm=gap).changed(test=0.0)  # nothing is scored here
        study = _study(own, "tuned", {own.name: settings}, train_set, split)
        _ingest(study)
        inputs = prepare(study, study.units()[0])
        before = validate(inputs, every=0)["iou"]
        numbers = [*places.values()]
        held_out = [Path(opened.where(numbers[k])).name for k in inputs.volumes[0].split["val"]]
        card = _train(own, study)
    after = card["val"]["iou"]
    gain = "" if after > before else f" That is no gain: keep {own.model}, or label more slices."
    return (
        f"IoU on slices kept out of training ({', '.join(held_out)}): {before:.3f} with "
        f"{own.model}, {after:.3f} now.{gain} So few slices say little; look at `emadapt preview`."
    )


def _meaning(names: tuple[str, ...], foreground: str) -> dict[str, Any]:
    """What label values mean, as settings of a dataset, for a model of these classes."""
    if names == INTERIOR_BOUNDARY:
        return {"foreground": foreground, "boundaries": True}
    if len(names) > 1:
        return {"classes": {name: (k,) for k, name in enumerate(names, 1)}}
    return {"foreground": foreground}


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
    stack = open_source(str(labels))
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


def _sample(own: Own) -> tuple[Grey, float]:
    """Parts of slices all over the volume, (n, y, x), and their distance in nm."""
    depth, *native = own.source.shape
    fits = [min(n, round(SIDE / f)) for n, f in zip(native, own.zoom, strict=True)]
    size = fits[0], fits[1]
    numbers = evenly_spaced(depth, SLICES)
    if own.consecutive:
        first = (depth - len(numbers)) // 2
        numbers = list(range(first, first + len(numbers)))
    moves = list(size) != native and not own.consecutive
    images = []
    for k, z in enumerate(numbers):
        shares = [(0.5 + k * step * moves) % 1 for step in GOLDEN]
        y, x = (round(s * (n - side)) for s, n, side in zip(shares, native, size, strict=True))
        images.append(own.read(z, y, x, size))
    spacing = own.voxel[0] * (1 if own.consecutive else depth / len(numbers))
    return np.stack(images), 1e6 if moves else spacing  # parts that move are far apart


def _study(
    own: Own,
    regime: str,
    datasets: dict[str, DatasetSettings],
    train_set: TrainSetSettings,
    split: SplitSettings,
    **settings: Any,
) -> Study:
    """A study with one unit, which starts from the model."""
    instead = {"head", "epochs", "head_lr", "adapter_lr", "weight_decay"}  # of `TRAIN`
    cleared = instead & own.regime.model_fields_set
    settings |= {"warm_start": str(own.start.folder), **dict.fromkeys(cleared)}
    backbone = str(own.spec.arch)
    return Study(
        name=regime,
        datasets=tuple(datasets),
        backbones=(backbone,),
        regimes=(regime,),
        train_sets=(own.name,),
        seeds=(0,),
        dataset_settings=datasets,
        train_set_settings={own.name: train_set},
        backbone_settings={backbone: own.spec},
        regime_settings={regime: own.regime.changed(**settings)},
        split=split,
        train=TRAIN.changed(head=own.start.card["head"]),
    )


@contextlib.contextmanager
def _workplace(own: Own, verb: str, stamp: list[Any]) -> Iterator[None]:
    """Within, the working directory is OUT.partial, with what a run of the same order left there.

    At the end the model is moved to OUT, and the rest is removed.
    """
    output = own.output.absolute()
    if output.exists() and not own.overwrite:
        found, do = "something of that name", "Replace it with --overwrite, or choose another -o."
        raise InputError(output, found=found, expected="a new folder", do=do)
    order = {
        "verb": verb,
        "volume": [str(Path(own.volume).absolute()), own.scale, own.source.stamp, stamp],
        "model": [str(own.start.folder), *sha256_of(own.start.folder)],
        "grey": own.grey,
        "voxel": own.voxel,
        "backbone": dumped(own.spec),
        "regime": dumped(own.regime),
    }
    order = json.loads(json.dumps(order))
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f"{output.name}.partial")
    with held(work):
        known = work / "order.json"
        if not known.is_file() or json.loads(known.read_text()) != order:
            clear(work)
            write_json(known, order)
        with contextlib.chdir(work):
            yield
        if output.exists():
            shutil.rmtree(output)
        (finished,) = (work / UNITS).glob("[!.]*")
        finished.rename(output)
    shutil.rmtree(work)


def _ingest(study: Study) -> None:
    for name in study.datasets:
        if not (INGESTED / name / "manifest.json").is_file():
            ingest(study, name)


def _train(own: Own, study: Study, **changes: Any) -> dict[str, Any]:
    """Train the unit of a study in the working directory; its card, with `changes`."""
    _ingest(study)
    os.environ["EMADAPT_TRACKING"] = "off"  # a user's volume is no experiment
    (unit,) = study.units()
    folder = train_unit(study, unit)
    card = {**json.loads((folder / "model.json").read_text()), **changes}
    write_json(folder / "model.json", card)
    write_text(folder / "model-card.md", model_card(card, None))
    return card
