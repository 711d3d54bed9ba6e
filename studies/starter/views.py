"""What a second look at a volume adds: mirrored, turned over, or at another pixel size.

`python studies/starter/views.py [FOLDER]` segments the slices of smooth.py with the model that
ships, as they are and with 2 x 2 pixels averaged. It prints IoU of the mean of each second look and
the first, averaged over 30 nm along z.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from smooth import THRESHOLDS, row, volumes

from emadapt import api
from emadapt.data.tiles import Grey
from emadapt.metrics.shapes import Mask
from emadapt.segment.model import Model
from emadapt.volumes.voxel import Voxel

Turn = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
AVERAGED_NM = 30.0
VIEWS: dict[str, tuple[Turn, float]] = {
    "mirrored along x": (lambda a: a[..., ::-1], 6.0),
    "rows and columns exchanged": (lambda a: a.swapaxes(1, 2), 6.0),
    "8 nm": (lambda a: a, 8.0),
    "5 nm": (lambda a: a, 5.0),
    "4.5 nm": (lambda a: a, 4.5),
    "4 nm": (lambda a: a, 4.0),
}
"""What is done to the volume, and undone, and the size of its pixels in nm."""
COARSE = ("8 nm", "4.5 nm")
"""Those that are tried with averaged pixels, too."""


def look(
    model: Model, image: Grey, voxel_nm: Voxel, turn: Turn = np.asarray, pixel_nm: float = 6.0
) -> npt.NDArray[np.float32]:
    """Probabilities (Z, Y, X) of a volume that is turned for the model, not averaged along z."""
    spec = model.segmenter.spec.changed(smooth_z_nm=0.0, pixel_nm=pixel_nm)
    model.segmenter.spec = spec
    turned = np.ascontiguousarray(turn(image))
    return turn(api.segment(turned, model, voxel_nm, probabilities=True, fast=True))


def rows(
    model: Model, name: str, image: Grey, label: Mask, voxel_nm: Voxel, views: tuple[str, ...]
) -> None:
    """Print the rows of a volume."""
    sigma = AVERAGED_NM / voxel_nm[0]
    own = look(model, image, voxel_nm)
    row(f"{name}, nothing", gaussian_filter1d(own, sigma, axis=0), label)
    for view in views:
        both = (own + look(model, image, voxel_nm, *VIEWS[view])) / 2
        row(f"{name}, {view}", gaussian_filter1d(both, sigma, axis=0), label)


def averaged(volume: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The mean of each 2 x 2 pixels."""
    z, y, x = volume.shape
    return np.asarray(volume.reshape(z, y // 2, 2, x // 2, 2).mean((2, 4)))


def main(root: Path) -> None:
    """Print the table."""
    print("| mean with | " + " | ".join(f"above {t}" for t in THRESHOLDS) + " |")
    print("|---" * (1 + len(THRESHOLDS)) + "|")
    model = api.load_model("starter")
    for name, image, label, voxel_nm in volumes(root):
        rows(model, name, image, label, voxel_nm, tuple(VIEWS))
        z, y, x = voxel_nm
        coarse = np.rint(averaged(image)).astype(np.uint8), averaged(label) >= 0.5
        rows(model, f"{name}, pixels of {2 * y:g} nm", *coarse, (z, 2 * y, 2 * x), COARSE)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
