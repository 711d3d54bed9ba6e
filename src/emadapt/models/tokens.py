"""The token cache: a frozen backbone sees each tile once; training, evaluation and diagnostics read the result.

A cache entry (a view of a dataset under a backbone) lies in scratch/tokens/<key>/, where the key is a hash over all that
could change its content. A stale entry can therefore not be read: with another input it has another name. View 0 holds
the slices as they are (training slices tiled once, validation and test slices with overlap); views from 1 on hold augmented
crops of the training slices, the same that a backbone in the training loop would be shown. Views -1 to -3, which `flips`
asks for, hold view 0's tiles of validation and test slices mirrored (`data.tiles.FLIPS`).

Where only the upper blocks are adapted (`lora_last_k`), an entry ends at the cut: it holds what enters the first adapted
block, and the tokens of the blocks below that the head sees. Both in fp16: what flows between blocks has a few large
channels, but far from its limit of 65504, and where it is finite its rounding (2^-11 of each value) is an eighth of bf16's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from emadapt.data.align import aligner_of
from emadapt.data.crops import Cached, Inputs, as_input, crop
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.labelled import Tile
from emadapt.data.tiles import (
    FLIPS,
    Geometry,
    geometry_of,
    label_to_input,
    to_input,
    with_neighbours,
)
from emadapt.errors import InputError
from emadapt.files import new_array, write_json
from emadapt.models.backbones import Backbone
from emadapt.models.device import autocast, device, resolve_precision
from emadapt.study.study import BackboneSettings, Study, digest

CACHE = Path("scratch/tokens")
FORMAT = 2  # raise when the same settings begin to mean other content
BATCH_TOKENS = 4096  # tokens that go through the backbone at once


@dataclass(frozen=True)
class TokenView:
    """One cache entry, memory-mapped.

    Attributes:
        tokens: (rows, blocks * D, h, w) float16; of an entry that ends at a cut, those of the blocks below it, perhaps none.
        labels: (rows, H, W) uint8 of 0 and 1, at the input's resolution.
        index: (rows, 3) int32: slice, and upper left corner (y, x) in the padded slice (of a crop: -1, -1).
        split: the dataset's slices by part.
        images: (rows, H, W) uint8, what the backbone was shown; with `context` (rows, H, W, 3).
        entering: (rows, N, D) float16, what leaves the block at the cut: class token, registers, patches; None without a cut.
        mirrored: of view 0 with `flips` its mirrored views, else none.
        only: training tiles that count as labelled; None: all.
    """

    tokens: npt.NDArray[np.float16]
    labels: npt.NDArray[np.uint8]
    index: npt.NDArray[np.int32]
    split: dict[str, list[int]]
    images: npt.NDArray[np.uint8] | None = None
    entering: npt.NDArray[np.float16] | None = None
    mirrored: tuple[TokenView, ...] = ()
    only: frozenset[Tile] | None = None

    def read(self, rows: int | slice, with_image: bool = False) -> Inputs:
        """What a segmenter takes: tokens alone where they are enough, else `Cached`; of one row or, batched, of several."""
        tokens = torch.from_numpy(np.array(self.tokens[rows]))
        if self.entering is None and not with_image:
            return tokens
        entering = (
            None if self.entering is None else torch.from_numpy(np.array(self.entering[rows]))
        )
        image = as_input(self.images[rows]) if with_image and self.images is not None else None
        return Cached(tokens, entering, image)

    def rows_of(self, part: str) -> npt.NDArray[np.int64]:
        """Rows whose slice belongs to `train`, `val` or `test`."""
        return self._labelled(np.flatnonzero(np.isin(self.index[:, 0], self.split[part])))

    def rows_of_slice(self, z: int) -> npt.NDArray[np.int64]:
        """Rows of slice `z`."""
        return self._labelled(np.flatnonzero(self.index[:, 0] == z))

    def _labelled(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of the rows that are no tiles of training slices, or labelled ones."""
        if self.only is None:
            return rows
        train = set(self.split["train"])
        return np.asarray(
            [
                r
                for r in rows
                if (place := tuple(self.index[r].tolist())) in self.only or place[0] not in train
            ],
            dtype=np.int64,
        )


def token_key(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, view: int, cut: int | None = None
) -> str:
    """Hash over weights, preprocessing, blocks, cut, geometry, data and view: everything that a cache entry depends on."""
    return digest(_ingredients(backbone, spec, volume, view, cut) | {"data": volume.md5})[:24]


def _pixels_key(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, view: int, cut: int | None
) -> str:
    """The same without the labels: entries that share it hold the same tokens and images, row by row."""
    plan = _plan(spec, volume, view, backbone.arch.patch)
    return digest(
        _ingredients(backbone, spec, volume, view, cut)
        | {"image": volume.manifest.get("image_md5", volume.md5), "plan": plan}
    )[:24]


def _ingredients(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, view: int, cut: int | None
) -> dict[str, Any]:
    settings = dataclasses.asdict(spec)
    # Hashes of weights and facts stand for sources and alignment; views, smoothing and flips change no entry.
    for key in ("source", "file", "views", "align", "reference", "smooth_z_nm", "flips"):
        settings.pop(key)
    if not spec.context:
        settings.pop("context")
    if view > 0:
        settings.pop("overlap")
    settings["precision"], settings["stride"] = resolve_precision(spec.precision), backbone.stride
    content = {
        "format": FORMAT,
        "weights": backbone.provenance.sha256,
        "blocks": list(backbone.blocks),
        "settings": settings,
        "view": view,
        "cut": cut,
    }
    facts = aligner_of(volume, spec).facts
    return content | ({"align": facts} if facts else {})


def token_views(
    backbone: Backbone,
    spec: BackboneSettings,
    volume: Volume,
    views: range,
    cache: Path = CACHE,
    cut: int | None = None,
) -> list[TokenView]:
    """Open the entries of `views`, computing those that are not there.

    Args:
        backbone: pretrained, at least below the cut.
        spec: its input settings.
        volume: the dataset.
        views: their numbers.
        cache: folder of the entries.
        cut: number of blocks to run, see `regimes.cut_of`; None: all, up to the last that the head sees.

    Raises:
        InputError: the backbone gives tokens that are not finite.
    """
    out = []
    for view in views:
        folder = cache / token_key(backbone, spec, volume, view, cut)
        if not (folder / "manifest.json").is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(
                cache / f"{folder.name}.lock"
            ):  # another stage may want the same entry now
                if not (folder / "manifest.json").is_file():
                    _extract(backbone, spec, volume, view, folder, cut)
        arrays = {f.stem: np.load(f, mmap_mode="r") for f in folder.glob("*.npy")}
        out.append(TokenView(split=volume.split, **arrays))
    return out


def plain_view(
    backbone: Backbone,
    spec: BackboneSettings,
    volume: Volume,
    cache: Path = CACHE,
    cut: int | None = None,
) -> TokenView:
    """View 0, with its mirrored views where `spec.flips` asks for them; arguments and errors of `token_views`."""
    plain, *mirrored = token_views(
        backbone, spec, volume, range(0, -len(FLIPS) if spec.flips else -1, -1), cache, cut
    )
    return dataclasses.replace(plain, mirrored=tuple(mirrored))


def cache_bytes(folder: Path) -> int:
    """Disk that a folder of the cache takes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def run(study: Study, backbone_name: str, dataset: str, out: Path = Path("build/tokens")) -> Path:
    """The `tokens` stage: fill the cache for one backbone and dataset, and write a small manifest for DVC to follow.

    Returns:
        The manifest: keys, bytes, rows, weights and data that the entries belong to. No times, so that a rerun writes the
        same bytes.
    """
    from emadapt.models.segmenter import build_frozen
    from emadapt.models.unet2d import NONE

    spec, volume = study.backbone_settings[backbone_name], open_volume(dataset)
    path = out / backbone_name / f"{dataset}.json"
    entries: list[dict[str, Any]] = []
    if all(study.regime_settings[name].no_backbone for name in study.regimes):
        if facts := aligner_of(volume, spec).facts:
            entries.append(
                {"align": digest(facts)}
            )  # a reference that changes is another training all the same
        manifest = {
            "backbone": backbone_name,
            "dataset": dataset,
            "data_md5": volume.md5,
            "entries": entries,
            "weights": NONE.to_dict(),
        }
        write_json(path, manifest)
        print(f"tokens {backbone_name} {dataset}: none, no regime of the study has a backbone")
        return path
    backbone = build_frozen(spec).to(device())
    started = time.perf_counter()
    for view in (*range(-len(FLIPS) + 1 if spec.flips else 0, 0), *range(spec.views + 1)):
        rows = len(token_views(backbone, spec, volume, range(view, view + 1))[0].index)
        key = token_key(backbone, spec, volume, view)
        entries.append({"view": view, "key": key, "rows": rows, "bytes": cache_bytes(CACHE / key)})
    manifest = {
        "backbone": backbone_name,
        "dataset": dataset,
        "data_md5": volume.md5,
        "entries": entries,
        "weights": backbone.provenance.to_dict(),
    }
    write_json(path, manifest)
    total = sum(e["bytes"] for e in entries) / 1e9
    print(
        f"tokens {backbone_name} {dataset}: {sum(e['rows'] for e in entries)} tiles, {total:.2f} GB on disk, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return path


def _plan(
    spec: BackboneSettings, volume: Volume, view: int, patch: int
) -> list[tuple[int, int, int]]:
    """Rows of an entry: (slice, y, x) of grid tiles, or (slice, -1, n) for the n-th augmented crop of a slice."""
    geo = geometry_of(volume, spec, patch)
    split = volume.split
    if view > 0:
        return [(z, -1, n) for z in split["train"] for n in range(len(geo.corners(0.0)))]
    plan = [(z, y, x) for z in split["train"] for y, x in geo.corners(0.0)] if view == 0 else []
    return plan + [
        (z, y, x) for part in ("val", "test") for z in split[part] for y, x in geo.corners()
    ]


def _extract(
    backbone: Backbone,
    spec: BackboneSettings,
    volume: Volume,
    view: int,
    folder: Path,
    cut: int | None,
) -> None:
    """Compute one entry under a temporary name, then rename.

    Where another entry has the same images (a dataset whose labels were corrected), its tokens are taken, as links to the files.
    """
    from rich.progress import track

    geo = geometry_of(volume, spec, backbone.arch.patch)
    plan = _plan(spec, volume, view, backbone.arch.patch)
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    pixels = _pixels_key(backbone, spec, volume, view, cut)
    same = _same_pixels(folder.parent, pixels)
    arrays = _new_arrays(
        temporary, backbone, geo, spec.context, len(plan), cut, with_tokens=same is None
    )
    np.save(
        temporary / "index.npy",
        np.asarray([(z, y, x) if y >= 0 else (z, -1, -1) for z, y, x in plan], dtype=np.int32),
    )
    batch = max(1, BATCH_TOKENS // math.prod(geo.grid))
    mirror = tuple(axis + 2 for axis in FLIPS[-view]) if view < 0 else ()  # of (h, w) or (h, w, 3)
    slice_now, image, label = -1, np.empty(0, np.uint8), np.empty(0, np.uint8)
    for start in track(range(0, len(plan), batch), description=f"tokens {volume.name} view {view}"):
        rows = plan[start : start + batch]
        for row, (z, y, x) in enumerate(rows, start):
            if slice_now != z:
                slice_now, label = z, label_to_input(volume.label[z], geo)
                image = to_input(with_neighbours(volume, z, spec.context), geo)
            if y < 0:
                seed = int(np.random.default_rng([view, z, x]).integers(2**31))
                arrays["images"][row], arrays["labels"][row] = crop(
                    image, label, geo.tile, seed, augmented=True
                )
            else:
                for name, whole in (("images", image), ("labels", label)):
                    arrays[name][row] = np.flip(
                        whole[y : y + geo.tile[0], x : x + geo.tile[1]], mirror
                    )
        if same:
            continue
        shown = as_input(arrays["images"][start : start + len(rows)])
        for name, values in _computed(backbone, shown, spec.precision, cut).items():
            if not np.isfinite(values).all():
                shutil.rmtree(temporary)
                raise InputError(
                    f"tokens of {volume.name}, slice {rows[0][0]}",
                    found="values that are not finite in fp16",
                    expected="finite tokens",
                    do="Check the backbone's weights file.",
                )
            arrays[name][start : start + len(rows)] = values
    for array in arrays.values():
        array.flush()
    for file in [f for f in same.glob("*.npy") if f.stem in ("tokens", "entering")] if same else []:
        os.link(file, temporary / file.name)
    facts = {
        "format": FORMAT,
        "rows": len(plan),
        "view": view,
        "cut": cut,
        "pixels": pixels,
        "data_md5": volume.md5,
    }
    write_json(temporary / "manifest.json", facts | {"weights": backbone.provenance.to_dict()})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _same_pixels(cache: Path, pixels: str) -> Path | None:
    """A finished entry of the same images under the same backbone, if there is one."""
    for file in sorted(cache.glob("[0-9a-f]*/manifest.json")):
        if file.parent.suffix != ".part" and json.loads(file.read_text()).get("pixels") == pixels:
            return file.parent
    return None


def _new_arrays(
    folder: Path,
    backbone: Backbone,
    geo: Geometry,
    context: int,
    rows: int,
    cut: int | None,
    *,
    with_tokens: bool,
) -> dict[str, np.memmap[Any, Any]]:
    """The large arrays of an entry, as files to be filled."""
    blocks = len([b for b in backbone.blocks if cut is None or b < cut])
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "tokens": (np.float16, (blocks * backbone.arch.dim, *geo.grid)),
        "labels": (np.uint8, geo.tile),
        "images": (np.uint8, (*geo.tile, 3) if context else geo.tile),
    }
    if cut is not None:
        shapes["entering"] = (
            np.float16,
            (backbone.vit.num_prefix_tokens + math.prod(geo.grid), backbone.arch.dim),
        )
    return {
        name: new_array(folder / f"{name}.npy", kind, (rows, *shape))
        for name, (kind, shape) in shapes.items()
        if with_tokens or name in ("labels", "images")
    }


def _computed(
    backbone: Backbone, images: torch.Tensor, precision: str, cut: int | None
) -> dict[str, npt.NDArray[np.float16]]:
    """What an entry holds of a batch of images."""
    if cut is None:
        return {
            "tokens": torch.cat(compute_tokens(backbone, images, precision), 1).half().cpu().numpy()
        }
    with torch.inference_mode(), autocast(precision):
        below, entering = backbone.entering(images.to(next(backbone.parameters()).device), cut)
    out = {"entering": entering.half().cpu().numpy()}
    return out | ({"tokens": torch.cat(below, 1).half().cpu().numpy()} if below else {})


@torch.inference_mode()
def compute_tokens(backbone: Backbone, images: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Tokens of a batch of images (B, 1, H, W) in [0, 1] under the given precision, one (B, D, h, w) per block."""
    with autocast(precision):
        return list(backbone(images.to(next(backbone.parameters()).device)))
