"""How much of the model's speed is left of the whole command, and how MONAI's sliding window does on the same tiles and model."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emadapt
from benchmarks.timing import timed
from emadapt.data.crops import as_input
from emadapt.models.device import autocast
from emadapt.models.monai_parts import monai_part
from emadapt.models.predict import BATCH_TILES, foreground
from emadapt.models.segmenter import Segmenter, build_segmenter, save_segmenter
from emadapt.segment.job import Order
from emadapt.segment.model import cached_model
from emadapt.segment.run import segment_volume
from emadapt.study.study import BackboneSettings, RegimeSettings

Row = dict[str, Any]


def segment_benchmark(
    arch: str = "dinov2_s", tile: int = 252, slices: int = 2, steps: int = 4, repeats: int = 3
) -> list[Row]:
    """Tiles a second of `emadapt segment` from a TIFF to a TIFF, of the model alone, and of MONAI's `sliding_window_inference`.

    All three run the same model, with random weights, on the same tiles, of which each covers half of its neighbour. The command
    reads, blends, thresholds and writes; MONAI has its slices in memory and blends them with Gaussian weights; the model has its
    tiles in memory. The model is loaded and warm.

    Args:
        arch: of the backbone.
        tile: its side.
        slices: of the volume.
        steps: from one end of a slice to the other; there are (steps + 1)^2 tiles a slice.
        repeats: in turns, so that what disturbs one disturbs the others; medians count.

    Returns:
        One row: tiles; tiles a second of each; the command's over the model's and over MONAI's, by the clock and by the
        processor's time, which other work on the machine changes less.
    """
    spec = BackboneSettings(arch, "random", tile=tile, overlap=0.5, views=0)
    side = tile + steps * (tile // 2)
    image = np.random.default_rng(0).integers(0, 256, (slices, side, side), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        order = _order(Path(name), spec, image)
        segmenter = cached_model(str((Path(name) / "model").resolve())).segmenter
        corners = [
            (y, x)
            for y in range(0, side - tile + 1, tile // 2)
            for x in range(0, side - tile + 1, tile // 2)
        ]
        tiles = torch.stack(
            [as_input(plane[y : y + tile, x : x + tile]) for plane in image for y, x in corners]
        )
        ways: dict[str, Callable[[], object]] = {
            "model": lambda: [
                foreground(segmenter, batch, (tile, tile)) for batch in tiles.split(BATCH_TILES)
            ],
            "monai": lambda: [_monai(segmenter, plane, tile) for plane in image],
            "segment": lambda: segment_volume(order),
        }
        for run in ways.values():  # what is set up at first use is nobody's time
            run()
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                taken[way].append(timed(run))
    clock, cpu = (
        {way: statistics.median(pair[i] for pair in pairs) for way, pairs in taken.items()}
        for i in (0, 1)
    )
    speeds = {f"{way}_per_s": len(tiles) / seconds for way, seconds in clock.items()}
    ratios = {f"of_{way}": clock[way] / clock["segment"] for way in ("model", "monai")}
    ratios |= {f"of_{way}_cpu": cpu[way] / cpu["segment"] for way in ("model", "monai")}
    return [{"arch": arch, "tiles": len(tiles), **speeds, **ratios}]


def _order(folder: Path, spec: BackboneSettings, image: np.ndarray) -> Order:
    """A model and a volume in files."""
    import tifffile

    facts = {
        "voxel_nm": {"noise": [5, 5, 5]},
        "intensity": {},
        "threshold": 0.5,
        "version": emadapt.__version__,
        "unit": "bench",
    }
    save_segmenter(
        build_segmenter(spec, RegimeSettings("frozen"), "pyramid", 0), folder / "model", facts
    )
    tifffile.imwrite(folder / "in.tif", image, photometric="minisblack")
    return Order(
        str(folder / "in.tif"),
        str(folder / "out.tif"),
        str(folder / "model"),
        voxel_nm=(5.0, 5.0, 5.0),
        overwrite=True,
    )


@torch.inference_mode()
def _monai(segmenter: Segmenter, plane: np.ndarray, tile: int) -> np.ndarray:
    """A slice as one segments it with MONAI."""
    sliding_window_inference = monai_part("inferers").sliding_window_inference
    device = next(segmenter.parameters()).device

    def predict(batch: torch.Tensor) -> torch.Tensor:
        with autocast(segmenter.spec.precision):
            return segmenter(batch, (tile, tile)).float().softmax(1)[:, 1:]

    image = as_input(plane)[None].to(device)
    found = sliding_window_inference(
        image, (tile, tile), BATCH_TILES, predict, overlap=0.5, mode="gaussian"
    )
    return np.asarray((found[0, 0] > 0.5).cpu().numpy())
