"""The token cache: a frozen backbone sees each tile once; training, evaluation and diagnostics read the result.

A cache entry (a view of a dataset under a backbone) lies in scratch/tokens/<key>/, where the key is a hash over all that
could change its content. A stale entry can therefore not be read: with another input it has another name. View 0 holds
the slices as they are (training slices tiled once, validation and test slices with overlap); views from 1 on hold augmented
crops of the training slices, the same that a backbone in the training loop would be shown.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from emadapt.config import BackboneSpec, Study, digest
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.patches import as_input, crop
from emadapt.data.tiles import geometry, label_to_input, to_input
from emadapt.device import autocast, device, resolve_precision
from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.models.backbones import Backbone

CACHE = Path("scratch/tokens")
FORMAT = 1  # raise when the same settings begin to mean other content
BATCH_TOKENS = 4096  # tokens that go through the backbone at once


@dataclass(frozen=True)
class TokenView:
    """One cache entry, memory-mapped.

    Attributes:
        tokens: (rows, blocks * D, h, w) float16.
        labels: (rows, H, W) uint8 of 0 and 1, at the input's resolution.
        index: (rows, 3) int32: slice, and upper left corner (y, x) in the padded slice (of a crop: -1, -1).
        split: the dataset's slices by part.
    """

    tokens: npt.NDArray[np.float16]
    labels: npt.NDArray[np.uint8]
    index: npt.NDArray[np.int32]
    split: dict[str, list[int]]

    def rows_of(self, part: str) -> npt.NDArray[np.int64]:
        """Rows whose slice belongs to `train`, `val` or `test`."""
        return np.flatnonzero(np.isin(self.index[:, 0], self.split[part]))

    def rows_of_slice(self, z: int) -> npt.NDArray[np.int64]:
        """Rows of slice `z`."""
        return np.flatnonzero(self.index[:, 0] == z)


def token_key(backbone: Backbone, spec: BackboneSpec, volume: Volume, view: int) -> str:
    """Hash over weights, preprocessing, blocks, geometry, data and view: everything that a cache entry depends on."""
    settings = dataclasses.asdict(spec)
    for key in ("source", "file", "views"):  # the weights' own hash stands for the first two
        settings.pop(key)
    if view > 0:
        settings.pop("overlap")
    settings["precision"] = resolve_precision(spec.precision)
    content = {"format": FORMAT, "weights": backbone.provenance.sha256, "blocks": list(backbone.blocks), "settings": settings,
               "data": volume.md5, "view": view}  # fmt: skip
    return digest(content)[:24]


def token_views(backbone: Backbone, spec: BackboneSpec, volume: Volume, views: range, cache: Path = CACHE) -> list[TokenView]:
    """Open the entries of `views`, computing those that are not there.

    Raises:
        InputError: the backbone gives tokens that are not finite.
    """
    out = []
    for view in views:
        folder = cache / token_key(backbone, spec, volume, view)
        if not (folder / "manifest.json").is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{folder.name}.lock"):  # another stage may want the same entry now
                if not (folder / "manifest.json").is_file():
                    _extract(backbone, spec, volume, view, folder)
        tokens, labels, index = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "labels", "index"))
        out.append(TokenView(tokens, labels, index, volume.split))
    return out


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

    spec, volume = study.backbone_specs[backbone_name], open_volume(dataset)
    backbone = build_frozen(spec).to(device())
    started = time.perf_counter()
    entries: list[dict[str, Any]] = []
    for view in range(spec.views + 1):
        rows = len(token_views(backbone, spec, volume, range(view, view + 1))[0].index)
        key = token_key(backbone, spec, volume, view)
        entries.append({"view": view, "key": key, "rows": rows, "bytes": cache_bytes(CACHE / key)})
    manifest = {"backbone": backbone_name, "dataset": dataset, "data_md5": volume.md5, "entries": entries,
                "weights": backbone.provenance.to_dict()}  # fmt: skip
    path = out / backbone_name / f"{dataset}.json"
    write_json(path, manifest)
    total = sum(e["bytes"] for e in entries) / 1e9
    print(f"tokens {backbone_name} {dataset}: {sum(e['rows'] for e in entries)} tiles, {total:.2f} GB on disk, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return path


def _plan(spec: BackboneSpec, volume: Volume, view: int, patch: int) -> list[tuple[int, int, int]]:
    """Rows of an entry: (slice, y, x) of grid tiles, or (slice, -1, n) for the n-th augmented crop of a slice."""
    geo = geometry((volume.image.shape[1], volume.image.shape[2]), spec, patch)
    split = volume.split
    if view > 0:
        return [(z, -1, n) for z in split["train"] for n in range(len(geo.corners(0.0)))]
    plan = [(z, y, x) for z in split["train"] for y, x in geo.corners(0.0)]
    return plan + [(z, y, x) for part in ("val", "test") for z in split[part] for y, x in geo.corners()]


def _extract(backbone: Backbone, spec: BackboneSpec, volume: Volume, view: int, folder: Path) -> None:
    """Compute one entry under a temporary name, then rename."""
    from rich.progress import track

    geo = geometry((volume.image.shape[1], volume.image.shape[2]), spec, backbone.arch.patch)
    plan = _plan(spec, volume, view, backbone.arch.patch)
    h, w = geo.tile[0] // backbone.arch.patch, geo.tile[1] // backbone.arch.patch
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    channels = backbone.arch.dim * len(backbone.blocks)
    tokens = np.lib.format.open_memmap(temporary / "tokens.npy", "w+", np.float16, (len(plan), channels, h, w))
    labels = np.lib.format.open_memmap(temporary / "labels.npy", "w+", np.uint8, (len(plan), *geo.tile))
    np.save(temporary / "index.npy", np.asarray([(z, y, x) if y >= 0 else (z, -1, -1) for z, y, x in plan], dtype=np.int32))
    batch = max(1, BATCH_TOKENS // (h * w))
    slice_now, image, label = -1, np.empty(0, np.uint8), np.empty(0, np.uint8)
    for start in track(range(0, len(plan), batch), description=f"tokens {volume.name} view {view}"):
        rows = plan[start : start + batch]
        images = []
        for row, (z, y, x) in enumerate(rows, start):
            if slice_now != z:
                slice_now, image, label = z, to_input(volume.image[z], geo), label_to_input(volume.label[z], geo)
            if y < 0:
                seed = int(np.random.default_rng([view, z, x]).integers(2**31))
                tile, labels[row] = crop(image, label, geo.tile, seed, augmented=True)
            else:
                tile = image[y : y + geo.tile[0], x : x + geo.tile[1]]
                labels[row] = label[y : y + geo.tile[0], x : x + geo.tile[1]]
            images.append(as_input(tile))
        out = torch.cat(compute_tokens(backbone, torch.stack(images), spec.precision), 1).half().cpu()
        if not torch.isfinite(out).all():
            shutil.rmtree(temporary)
            raise InputError(f"tokens of {volume.name}, slice {rows[0][0]}", found="values that are not finite",
                             expected="finite tokens", do="Check the backbone's weights file.")  # fmt: skip
        tokens[start : start + len(rows)] = out.numpy()
    tokens.flush()
    labels.flush()
    write_json(temporary / "manifest.json", {"format": FORMAT, "rows": len(plan), "weights": backbone.provenance.to_dict(),
                                             "data_md5": volume.md5, "view": view})  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@torch.inference_mode()
def compute_tokens(backbone: Backbone, images: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Tokens of a batch of images (B, 1, H, W) in [0, 1] under the given precision, one (B, D, h, w) per block."""
    with autocast(precision):
        return list(backbone(images.to(next(backbone.parameters()).device)))
