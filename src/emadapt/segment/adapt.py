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

from emadapt.data.foreground import is_foreground
from emadapt.data.ingest import INGESTED, check_pair, ingest, open_volume
from emadapt.data.splits import evenly_spaced
from emadapt.data.tiles import Grey
from emadapt.errors import InputError
from emadapt.files import write_json, write_text
from emadapt.segment.job import model_voxel, window_for
from emadapt.segment.labelled import labelled
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
from emadapt.volumes.grey import MIDDLE, constant, to_uint8
from emadapt.volumes.opening import check_apart, open_image
from emadapt.volumes.source import Source, tell
from emadapt.volumes.voxel import Voxel

SLICES, SIDE = 32, 1024
"""Slices of a volume that are learned from without labels, and pixels of their sides, at most."""
DOMAINS = 24
"""Synthetic domains whose labels keep `adapt` from forgetting what a mitochondrion is."""
GOLDEN = 0.7548776662466927, 0.5698402909980532
"""Steps of a sequence that covers a square evenly (Roberts 2018, R2)."""
VAL, APART_NM = 0.2, 30.0
"""Share of the labelled slices that `tune` validates on, the last ones, and how far from these
slices must be to train on."""
MODEL_FILES = {"model.json", "model.safetensors", "history.json", "metrics.json", "model-card.md"}
"""All that a folder may hold which `--overwrite` replaces."""
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
        source = open_image(str(Path(self.volume).absolute()), self.scale)
        tell(source.name, source.notes)
        return source

    @cached_property
    def start(self) -> Model:
        return open_model(find_model(self.model).resolve())

    @cached_property
    def voxel(self) -> Voxel:
        return model_voxel(self.source, self.voxel_nm, self.start)

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
        name = re.sub(r"\W", "_", stem, flags=re.ASCII)
        return "volume" if name in ("", "synthetic") else name  # `adapt` has a dataset synthetic

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
        """A part of a slice, 8 bits; `constant` areas as `segment` shows them to the model."""
        height, width = size or self.source.shape[1:]
        part = self.source.read(z, z + 1, y, y + height)[0, :, x : x + width]
        return np.where(constant(part), MIDDLE, to_uint8(part, *self.grey))


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
    if not re.fullmatch(r">\d+(\.\d+)?", foreground):
        expected, do = ">N, such as >127", "Correct it; put it in quotes."
        raise InputError("--foreground", found=foreground, expected=expected, do=do)
    opened, places = labelled(own.source, labels.absolute(), slices)
    places, val_share = _apart(places, own.voxel[0], labels)
    data = Path("data", own.name)
    with _workplace(own, "tune", [opened.stamp, [*places], foreground], str(labels)):
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
        train_set = TrainSetSettings(datasets=(own.name,))
        split = SplitSettings(val=val_share, gap_nm=0.0).changed(test=0.0)  # nothing is scored here
        study = _study(own, "tuned", {own.name: settings}, train_set, split, self_training=0.0)
        _ingest(study)
        volume, numbers = open_volume(own.name), [*places.values()]
        val = volume.split["val"]
        held_out = ", ".join(Path(opened.where(numbers[k])).name for k in val)
        if not is_foreground(volume.label[val]).any():
            found, expected = f"no foreground in {held_out}, kept out of training", "some"
            do = "Leave out empty slices at the end, or label others."
            raise InputError(labels, found=found, expected=expected, do=do)
        inputs = prepare(study, study.units()[0])
        before = validate(inputs, every=0, threshold=own.start.card["threshold"])["iou"]
        card = _train(own, study)
    after = card["val"]["iou"]
    gain = "" if after > before else f" That is no gain: keep {own.model}, or label more slices."
    return (
        f"IoU on slices kept out of training ({held_out}): {before:.3f} with "
        f"{own.model}, {after:.3f} now.{gain} These slices also chose the best of the new model's "
        "epochs, so its figure is a little too high. Look at both with `emadapt preview`."
    )


def _apart(places: dict[int, int], z_nm: float, labels: Path) -> tuple[dict[int, int], float]:
    """Labelled slices without those near validation's, and the share of these that validate."""
    numbers = [*places]
    n_val = max(1, round(VAL * len(numbers)))
    train, first = numbers[:-n_val], numbers[-n_val]
    near = [z for z in train if (first - z) * z_nm < APART_NM]
    if near == train:
        found, expected = f"labelled slices within {APART_NM:g} nm", "one that is farther away"
        raise InputError(labels, found=found, expected=expected, do="Label a slice elsewhere.")
    if near:
        why = f"nearer than {APART_NM:g} nm to those that are kept out of training"
        tell("tune", [f"labelled slices {', '.join(map(str, near))} are left out: {why}"])
    kept = {z: k for z, k in places.items() if z not in near}
    return kept, n_val / len(kept)


def _meaning(names: tuple[str, ...], foreground: str) -> dict[str, Any]:
    """What label values mean, as settings of a dataset, for a model of these classes."""
    if names == INTERIOR_BOUNDARY:
        return {"foreground": foreground, "boundaries": True}
    if len(names) > 1:
        return {"classes": {name: (k,) for k, name in enumerate(names, 1)}}
    return {"foreground": foreground}


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
def _workplace(own: Own, verb: str, stamp: list[Any], *inputs: str) -> Iterator[None]:
    """Within, the working directory is OUT.partial, with what a run of the same order left there.

    At the end the model is moved to OUT, and the rest is removed.
    """
    output = own.output.absolute()
    _check_output(output, own.overwrite)
    for source in (own.volume, *inputs):
        check_apart(output, source)
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
        with contextlib.chdir(work), _untracked():
            yield
        (finished,) = (work / UNITS).glob("[!.]*")
        if output.exists():
            output.rename(work / "replaced")
        finished.rename(output)
    shutil.rmtree(work)


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse, before work, to replace what is not a model, or has files of someone else in it."""
    if not output.exists():
        return
    found, do = "something of that name", "Replace it with --overwrite, or choose another -o."
    if overwrite:
        inside = {path.name for path in output.iterdir()} if output.is_dir() else set()
        if "model.json" in inside and inside <= MODEL_FILES:
            return
        found, do = "something else than a model alone", "Choose another -o."
    raise InputError(output, found=found, expected="no folder yet, or a model", do=do)


@contextlib.contextmanager
def _untracked() -> Iterator[None]:
    """Within, nothing is logged in MLflow: a user's volume is no experiment."""
    before = os.environ.get("EMADAPT_TRACKING", "")
    os.environ["EMADAPT_TRACKING"] = "off"
    try:
        yield
    finally:
        os.environ["EMADAPT_TRACKING"] = before


def _ingest(study: Study) -> None:
    for name in study.datasets:
        if not (INGESTED / name / "manifest.json").is_file():
            ingest(study, name)


def _train(own: Own, study: Study, **changes: Any) -> dict[str, Any]:
    """Train the unit of a study in the working directory; its card, with `changes`.

    Where the first model looks twice, so does the new one.
    """
    _ingest(study)
    (unit,) = study.units()
    folder = train_unit(study, unit)
    looks = {key: value for key, value in own.start.card.items() if key == "second_pixel_nm"}
    card = {**json.loads((folder / "model.json").read_text()), **looks, **changes}
    write_json(folder / "model.json", card)
    write_text(folder / "model-card.md", model_card(card, None))
    return card
