"""`emadapt segment` against the bare model on the same tiles, and against MONAI's window.

All three run the same model on the same tiles, each of which covers half of its neighbour.
"""

from __future__ import annotations

import numpy as np
import tifffile
import torch

from benchmarks.timing import print_table, seconds
from benchmarks.workplace import emadapt, train, workplace, write_study, write_volume
from emadapt import api
from emadapt.models.device import autocast, device
from emadapt.models.monai_parts import monai_part

TILE, SLICES, STEPS, REPEATS = 252, 2, 4, 3
SIDE = TILE + STEPS * (TILE // 2)
BATCH = 4


def main() -> None:
    """Print tiles in a second of each way, and how much longer the command takes."""
    with workplace():
        write_volume("noise", 24, TILE)
        backbone = {"arch": "dinov2_s", "tile": TILE, "overlap": 0.5}
        write_study(backbone, {"frozen": {"kind": "frozen"}}, {"steps_per_epoch": 1, "epochs": 1})
        emadapt("ingest", "noise")
        train("frozen")
        image = np.random.default_rng(0).integers(0, 256, (SLICES, SIDE, SIDE), dtype=np.uint8)
        tifffile.imwrite("in.tif", image, photometric="minisblack")
        compare(image)


def compare(image: np.ndarray) -> None:
    """Time the three ways on an image (Z, Y, X)."""
    model = api.load_model("build/units/b-frozen-noise-0")
    segmenter, precision = model.segmenter, model.segmenter.spec.precision
    slices = torch.from_numpy(image[:, None] / np.float32(255)).to(device())
    corners = range(0, SIDE - TILE + 1, TILE // 2)
    tiles = [slices[:, :, y : y + TILE, x : x + TILE] for y in corners for x in corners]
    batches = torch.cat(tiles).split(BATCH)

    def predict(batch: torch.Tensor) -> torch.Tensor:
        with autocast(precision):
            return segmenter(batch, (TILE, TILE)).float().softmax(1)[:, 1:]

    def by_monai() -> None:
        window = monai_part("inferers").sliding_window_inference
        window(slices, (TILE, TILE), BATCH, predict, overlap=0.5, mode="gaussian")

    def by_emadapt() -> None:
        volume, _ = api.read_volume("in.tif")
        mask = api.segment(volume, model, (5, 5, 5))
        tifffile.imwrite("out.tif", mask.astype(np.uint8) * 255, photometric="minisblack")

    with torch.inference_mode():
        ours = seconds(by_emadapt, REPEATS)
        bare = seconds(lambda: [predict(batch) for batch in batches], REPEATS)
        monai = seconds(by_monai, REPEATS)
    speeds = {"emadapt": ours, "model": bare, "monai": monai}
    tiles_per_s = {f"{name}_per_s": len(tiles) * SLICES / taken for name, taken in speeds.items()}
    print_table([tiles_per_s | {"over_model": ours / bare, "over_monai": ours / monai}])


if __name__ == "__main__":
    main()
