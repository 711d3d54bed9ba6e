"""The token cache: a frozen backbone sees each tile once, and all later stages read it.

An entry (a view of a dataset under a backbone) is a folder scratch/tokens/<key>/, where the key is
a hash of all that its content depends on. So a stale entry is never read: other input has another
key. View 0 has the slices as they are (training slices tiled once, validation and test slices with
overlap). Views from 1 on have augmented crops of the training slices, the same that a backbone in
the training loop would be shown.

Where only the upper blocks are adapted (`lora_last_k`), an entry ends at the cut: it has what
enters the first adapted block, and the tokens of the blocks below that the head sees. Both in fp16:
values between blocks stay far below its limit of 65504, and its rounding (2^-11 of each value) is
an eighth of bf16's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from emadapt.data.align import aligner_of
from emadapt.data.crops import as_input, crop
from emadapt.data.images import WHOLE
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.labelled import Tile
from emadapt.data.tiles import Geometry, geometry_of, label_to_input, to_input, with_neighbours
from emadapt.errors import InputError
from emadapt.files import checksums, is_sound, new_array, whole_folder, write_json, write_text
from emadapt.models.backbones import Backbone, Pooled, pretrained
from emadapt.models.device import autocast, device, resolve_precision
from emadapt.models.passthrough import NONE
from emadapt.models.segmenter import Inputs, Partial
from emadapt.progress import progress_bar
from emadapt.study.backbones import BackboneSettings
from emadapt.study.keys import digest
from emadapt.study.study import Study

CACHE = Path("scratch/tokens")
DONE = "rows"
"""File with the number of finished rows of an entry that is not complete."""
FORMAT = 3  # raise when the same settings begin to mean other content
BATCH_TOKENS = 4096  # tokens that go through the backbone at once
SETTINGS = ("scale", "longest_edge", "tile", "context", "normalisation")
"""Of a backbone's settings, those that change the tokens of a tile."""


@dataclass(frozen=True)
class TokenView:
    """One cache entry, memory-mapped.

    Attributes:
        tokens: (rows, blocks * D, h, w) float16; of an entry that ends at a cut, those of the
            blocks below it, perhaps none; of whole images (rows, blocks * 2 * D, 1, 1).
        labels: (rows, H, W) uint8 of class ids and `IGNORE`, at the input's resolution.
        index: (rows, 3) int32: slice, and upper left corner (y, x) in the padded slice (of a crop:
            -1, -1).
        split: the dataset's slices by part.
        ends: where its volumes begin, see `Volume.ends`.
        entering: (rows, N, D) float16, what leaves the block at the cut: class token, registers,
            patches; None without a cut.
        only: training tiles that count as labelled; None: all.
    """

    tokens: npt.NDArray[np.float16]
    labels: npt.NDArray[np.uint8]
    index: npt.NDArray[np.int32]
    split: dict[str, list[int]]
    entering: npt.NDArray[np.float16] | None = None
    only: frozenset[Tile] | None = None
    ends: Sequence[int] = ()

    def read(self, rows: int | npt.NDArray[np.int64]) -> Inputs:
        """What a segmenter takes, of one row or, batched, of several."""
        tokens = torch.from_numpy(np.array(self.tokens[rows]))
        if self.entering is None:
            return tokens
        return Partial(tokens, torch.from_numpy(np.array(self.entering[rows])))

    def rows_of(self, part: str) -> npt.NDArray[np.int64]:
        """Rows whose slice belongs to `train`, `val` or `test`."""
        return self._labelled(np.flatnonzero(np.isin(self.index[:, 0], self.split[part])))

    def rows_of_slice(self, z: int) -> npt.NDArray[np.int64]:
        """Rows of slice `z`."""
        return self._labelled(np.flatnonzero(self.index[:, 0] == z))

    def batches(self, z: int, size: int) -> Iterator[Inputs]:
        """What a segmenter takes of slice `z`, at most `size` tiles at once."""
        rows = self.rows_of_slice(z)
        for start in range(0, len(rows), size):
            yield self.read(rows[start : start + size])

    def _labelled(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Without the tiles of training slices that do not count as labelled."""
        if self.only is None:
            return rows
        places = [tuple(place) for place in self.index[rows].tolist()]
        train = set(self.split["train"])
        kept = [place in self.only or place[0] not in train for place in places]
        return rows[np.asarray(kept, dtype=bool)]


@dataclass(frozen=True)
class Entry:
    """One view of a dataset under a backbone; `cut` as for `token_views`."""

    backbone: Backbone
    spec: BackboneSettings
    volume: Volume
    view: int
    cut: int | None = None

    @property
    def ingredients(self) -> dict[str, Any]:
        """All that the tokens depend on but the data."""
        settings = {name: getattr(self.spec, name) for name in SETTINGS}
        if self.view == 0:
            settings["overlap"] = self.spec.overlap
        elif self.spec.jitter:
            settings["jitter"] = True
        return {
            "format": FORMAT,
            "weights": self.backbone.provenance.sha256,
            "blocks": list(self.backbone.blocks),
            "settings": settings | {"precision": resolve_precision(self.spec.precision)},
            "align": aligner_of(self.volume, self.spec).facts,
            "view": self.view,
            "cut": self.cut,
        }

    @cached_property
    def key(self) -> str:
        """Hash of all that the entry depends on."""
        return digest(self.ingredients | {"data": self.volume.md5})[:24]

    @property
    def pixels(self) -> str:
        """The key without the labels: entries that share it have the same tokens, row by row."""
        image = self.volume.manifest.get("image_md5", self.volume.md5)
        return digest(self.ingredients | {"image": image, "plan": self.plan})[:24]

    @cached_property
    def geo(self) -> Geometry:
        return geometry_of(self.volume, self.spec, self.backbone.arch.patch)

    @cached_property
    def plan(self) -> list[tuple[int, int, int]]:
        """Rows: (slice, y, x) of a grid tile, or (slice, -1, n) of the n-th crop."""
        split, corners = self.volume.split, self.geo.corners(0.0)
        if self.view > 0:
            return [(z, -1, n) for z in split["train"] for n in range(len(corners))]
        train = [(z, y, x) for z in split["train"] for y, x in corners]
        held_out = (z for part in ("val", "test") for z in split[part])
        return train + [(z, y, x) for z in held_out for y, x in self.geo.corners()]

    def tiles(self, first: int) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Image, (h, w) or (h, w, 3), and label (h, w) of each row from `first` on."""
        slice_now, image, label = -1, np.empty(0, np.uint8), np.empty(0, np.uint8)
        height, width = self.geo.tile
        for z, y, x in self.plan[first:]:
            if slice_now != z:
                slice_now, label = z, label_to_input(self.volume.label[z], self.geo)
                image = to_input(with_neighbours(self.volume, z, self.spec.context), self.geo)
            if y < 0:
                seed = int(np.random.default_rng([self.view, z, x]).integers(2**31))
                yield crop(image, label, self.geo.tile, seed, True, self.spec.jitter)
            else:
                place = np.s_[y : y + height, x : x + width]
                yield image[place], label[place]

    def arrays(self, folder: Path, *, with_tokens: bool) -> dict[str, np.memmap[Any, Any]]:
        """The large arrays, as files to be filled; some of their rows are, if `DONE` is there."""
        if (folder / DONE).is_file():
            files = [folder / f"{name}.npy" for name in ("labels", "tokens", "entering")]
            return {f.stem: np.load(f, mmap_mode="r+") for f in files if f.is_file()}
        rows, (h, w), cut = len(self.plan), self.geo.grid, self.cut
        label = WHOLE if self.volume.whole_images else self.geo.tile
        arrays = {"labels": new_array(folder / "labels.npy", np.uint8, (rows, *label))}
        if not with_tokens:
            return arrays
        dim = self.backbone.arch.dim
        blocks = [b for b in self.backbone.blocks if cut is None or b < cut]
        tokens = self.backbone.shape_of(len(blocks), (h, w))
        shapes: dict[str, tuple[int, ...]] = {"tokens": (rows, *tokens)}
        if cut is not None:
            shapes["entering"] = (rows, self.backbone.vit.num_prefix_tokens + h * w, dim)
        for name, shape in shapes.items():
            arrays[name] = new_array(folder / f"{name}.npy", np.float16, shape)
        return arrays

    def open(self, cache: Path) -> TokenView:
        """The entry in a cache, computed if it is not there or damaged."""
        folder = cache / self.key
        if not is_sound(folder):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{folder.name}.lock"):  # another stage may want it now, too
                if not is_sound(folder):
                    if folder.exists():
                        name = self.volume.name
                        print(f"tokens of {name}: {folder} is damaged or old; made again")
                    _extract(self, folder)
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        return TokenView(split=self.volume.split, ends=self.volume.ends, **arrays)


def token_views(
    backbone: Backbone,
    spec: BackboneSettings,
    volume: Volume,
    views: range,
    cache: Path = CACHE,
    cut: int | None = None,
) -> list[TokenView]:
    """Open the entries of `views`, computing those that are not there or damaged.

    Args:
        backbone: pretrained, at least below the cut.
        spec: its input settings.
        volume: the dataset.
        views: their numbers.
        cache: folder of the entries.
        cut: number of blocks to run; None: all, up to the last that the head sees.

    Raises:
        InputError: the backbone gives tokens that are not finite.
    """
    return [Entry(backbone, spec, volume, view, cut).open(cache) for view in views]


def plain_view(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, cut: int | None = None
) -> TokenView:
    """View 0; arguments and errors of `token_views`."""
    return token_views(backbone, spec, volume, range(1), cut=cut)[0]


def run(study: Study, backbone_name: str, dataset: str, out: Path = Path("build/tokens")) -> Path:
    """The stage `tokens`: fill the cache for one backbone and dataset.

    Returns:
        The manifest: keys, bytes, rows, weights and data that the entries belong to. No times, so
        that a rerun writes the same bytes.
    """
    spec, volume = study.backbone_settings[backbone_name], open_volume(dataset)
    spec = spec.of_images() if study.classifies else spec
    manifest = {"backbone": backbone_name, "dataset": dataset, "data_md5": volume.md5}
    path = out / backbone_name / f"{dataset}.json"
    if all(not study.regime_settings[name].uses_backbone for name in study.regimes):
        facts = aligner_of(volume, spec).facts  # another reference is another training
        aligned = [{"align": digest(facts)}] if facts else []
        write_json(path, manifest | {"entries": aligned, "weights": NONE.to_dict()})
        print(f"tokens {backbone_name} {dataset}: none, no regime of the study has a backbone")
        return path
    started, kind = time.perf_counter(), Pooled if study.classifies else Backbone
    backbone = pretrained(spec, kind).to(device())
    views = range(spec.views + 1)
    entries = [_facts(Entry(backbone, spec, volume, view)) for view in views]
    write_json(path, manifest | {"entries": entries, "weights": backbone.provenance.to_dict()})
    tiles, size = (sum(entry[key] for entry in entries) for key in ("rows", "bytes"))
    seconds = time.perf_counter() - started
    cost = f"{size / 1e9:.2f} GB on disk, {seconds:.0f} s"
    print(f"tokens {backbone_name} {dataset}: {tiles} tiles, {cost}")
    return path


def _facts(entry: Entry) -> dict[str, Any]:
    """What the stage's manifest says of an entry, which is computed if it is not there."""
    rows = len(entry.open(CACHE).index)
    size = sum(f.stat().st_size for f in (CACHE / entry.key).glob("*.npy"))
    return {"view": entry.view, "key": entry.key, "rows": rows, "bytes": size}


def _extract(entry: Entry, folder: Path) -> None:
    """Compute one entry, or go on where that was stopped.

    Where another entry has the same images (a dataset whose labels were corrected), its tokens are
    linked, not computed.
    """
    backbone, volume, plan = entry.backbone, entry.volume, entry.plan
    same = _same_pixels(folder.parent, entry.pixels)
    index = [(z, y, x) if y >= 0 else (z, -1, -1) for z, y, x in plan]
    with whole_folder(folder, resumed=same is None) as temporary:
        arrays = entry.arrays(temporary, with_tokens=same is None)
        np.save(temporary / "index.npy", np.asarray(index, dtype=np.int32))
        _fill(entry, arrays, temporary / DONE, with_tokens=same is None)
        for name in ("tokens", "entering"):
            if same and (same / f"{name}.npy").is_file():
                os.link(same / f"{name}.npy", temporary / f"{name}.npy")
        facts = {"rows": len(plan), "view": entry.view, "cut": entry.cut, "pixels": entry.pixels}
        made_of = {"data_md5": volume.md5, "weights": backbone.provenance.to_dict()}
        whole = {"checksums": checksums(temporary)}
        write_json(temporary / "manifest.json", facts | made_of | whole)
        (temporary / DONE).unlink()


def _fill(
    entry: Entry, arrays: dict[str, np.memmap[Any, Any]], done: Path, *, with_tokens: bool
) -> None:
    """Fill the arrays of an entry; `done` has the number of rows that are filled already."""
    plan, name = entry.plan, entry.volume.name
    first = int(done.read_text()) if done.is_file() else 0
    batch = max(1, BATCH_TOKENS // math.prod(entry.geo.grid))
    tiles = entry.tiles(first)
    with progress_bar(f"tokens of {name}, view {entry.view}", len(plan), first) as advance:
        for start in range(first, len(plan), batch):
            rows = slice(start, min(start + batch, len(plan)))
            images, labels = zip(*(next(tiles) for _ in plan[rows]), strict=True)
            arrays["labels"][rows] = np.stack(labels)
            if with_tokens:
                computed = _computed(
                    entry.backbone, np.stack(images), entry.spec.precision, entry.cut
                )
                for kind, values in computed.items():
                    _check_finite(values, name, plan[start][0])
                    arrays[kind][rows] = values
            if rows.stop == len(plan) or plan[rows.stop][0] != plan[start][0]:
                for array in arrays.values():
                    array.flush()
                write_text(done, str(rows.stop))
            advance(rows.stop - start)


def _check_finite(values: npt.NDArray[np.float16], dataset: str, z: int) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            f"tokens of {dataset}, slice {z}",
            found="values that are not finite in fp16",
            expected="finite tokens",
            do="Check the backbone's weights file.",
        )


def _same_pixels(cache: Path, pixels: str) -> Path | None:
    """A sound entry of the same images under the same backbone, if there is one."""
    for file in sorted(cache.glob("[0-9a-f]*/manifest.json")):
        if pixels in file.read_text(errors="replace") and is_sound(file.parent):
            return file.parent
    return None


def _computed(
    backbone: Backbone, images: npt.NDArray[np.uint8], precision: str, cut: int | None
) -> dict[str, npt.NDArray[np.float16]]:
    """What an entry has of a batch of tiles (n, h, w) or (n, h, w, 3)."""
    shown = as_input(images)
    if cut is None:
        return {"tokens": _half(torch.cat(compute_tokens(backbone, shown, precision), 1))}

    def run(part: torch.Tensor) -> list[torch.Tensor]:
        below, entering = backbone.entering(part.to(backbone.mean.device), cut)
        return [entering, *below]

    with torch.inference_mode(), autocast(precision):
        entering, *below = backbone.fitting(run, shown)
    out = {"entering": _half(entering)}
    return out | ({"tokens": _half(torch.cat(below, 1))} if below else {})


def _half(values: torch.Tensor) -> npt.NDArray[np.float16]:
    return np.asarray(values.half().cpu().numpy())


@torch.inference_mode()
def compute_tokens(backbone: Backbone, images: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Tokens (B, D, h, w) of each block, of images (B, 1, H, W) in [0, 1]."""
    with autocast(precision):
        return backbone.fitting(lambda part: backbone(part.to(backbone.mean.device)), images)
