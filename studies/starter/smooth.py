"""What overlapping tiles, and averaging along z, do for a model that has seen no real volume.

`python studies/starter/smooth.py [FOLDER] [MODEL]` segments a crop of Lucchi's training half and
all of VNC from FOLDER (default `data`) with MODEL (default `starter`), and prints IoU for each
overlap of tiles and each width of a Gaussian along z.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

from emadapt import api
from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS
from emadapt.data.tiles import Grey
from emadapt.metrics.shapes import Mask
from emadapt.volumes.voxel import Voxel

CROPS = {
    "lucchi": np.s_[:, 128:640, 256:768],
    "vnc": np.s_[:],
}
SLICES = {"lucchi": (40, 120), "vnc": (0, 20)}
"""First and end of those that are segmented, of the training half."""
OVERLAPS = (0.25, 0.5)
WIDTHS_NM = (0, 20, 30, 40)
THRESHOLDS = (0.4, 0.5, 0.6, 0.7)


def row(name: str, found: npt.NDArray[np.float32], label: npt.NDArray[np.bool_]) -> None:
    """Print the IoU at each threshold."""
    masks = [found > threshold for threshold in THRESHOLDS]
    scores = [(mask & label).sum() / (mask | label).sum() for mask in masks]
    print(f"| {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |", flush=True)


def volumes(root: Path) -> Iterator[tuple[str, Grey, Mask, Voxel]]:
    """Name, image and label (Z, Y, X) and voxel size (nm) of what is segmented."""
    for name, crop in CROPS.items():
        known = DATASETS[name]
        part = find_parts(root / name, known.layout, "number")[0]
        first, end = SLICES[name]
        image = np.ascontiguousarray(part.images.read(first, end)[crop])
        label = part.labels.read(first, end)[crop] > int(known.foreground[1:])
        yield name, image, label, known.voxel_nm


def main(root: Path, name_of_model: str) -> None:
    """Print the table."""
    print("| averaged over | " + " | ".join(f"above {t}" for t in THRESHOLDS) + " |")
    print("|---" * (1 + len(THRESHOLDS)) + "|")
    model = api.load_model(name_of_model)
    for name, image, label, voxel_nm in volumes(root):
        for overlap in OVERLAPS:
            spec = model.segmenter.spec.changed(smooth_z_nm=0.0, overlap=overlap)
            model.segmenter.spec = spec
            found = api.segment(image, model, voxel_nm, probabilities=True, fast=True)
            for width in WIDTHS_NM:
                sigma = width / voxel_nm[0]
                averaged = gaussian_filter1d(found, sigma, axis=0) if width else found
                row(f"{name}, overlap {overlap}, {width} nm", averaged, label)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0] if given else "data"), given[1] if len(given) > 1 else "starter")
