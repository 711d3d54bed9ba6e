"""What a second look at a volume adds: mirrored, turned over, or at another pixel size.

`python studies/starter/views.py [FOLDER]` segments the slices of smooth.py with the model that
ships. It prints IoU of the mean of each second look and the first, averaged over 30 nm along z.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from smooth import CROPS, SLICES, THRESHOLDS, row

from emadapt import api
from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS

Turn = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
AVERAGED_NM = 30.0
VIEWS: dict[str, tuple[Turn, float]] = {
    "mirrored along x": (lambda a: a[..., ::-1], 6.0),
    "rows and columns exchanged": (lambda a: a.swapaxes(1, 2), 6.0),
    "4.5 nm": (lambda a: a, 4.5),
    "8 nm": (lambda a: a, 8.0),
}
"""What is done to the volume, and undone, and the size of its pixels in nm."""


def main(root: Path) -> None:
    """Print the table."""
    print("| mean with | " + " | ".join(f"above {t}" for t in THRESHOLDS) + " |")
    print("|---" * (1 + len(THRESHOLDS)) + "|")
    model = api.load_model("starter")
    plain = model.segmenter.spec.changed(smooth_z_nm=0.0)
    for name, crop in CROPS.items():
        known = DATASETS[name]
        part = find_parts(root / name, known.layout, "number")[0]
        first, end = SLICES[name]
        image = part.images.read(first, end)[crop]
        label = part.labels.read(first, end)[crop] > int(known.foreground[1:])
        sigma = AVERAGED_NM / known.voxel_nm[0]
        own = np.zeros(0)
        for view, (turn, pixel_nm) in {"nothing": (np.asarray, 6.0), **VIEWS}.items():
            model.segmenter.spec = plain.changed(pixel_nm=pixel_nm)
            turned = np.ascontiguousarray(turn(image))
            found = turn(api.segment(turned, model, known.voxel_nm, probabilities=True))
            own = own if own.size else found
            row(f"{name}, {view}", gaussian_filter1d((own + found) / 2, sigma, axis=0), label)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
