"""What averaging along z, and a second plane, do for the model that ships.

`python studies/starter/smooth.py [FOLDER]` segments a crop of Lucchi's training half and all of VNC
from FOLDER (default `data`), keeps the probabilities in scratch/starter/, and prints IoU for each
width of a Gaussian along z.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

from emadapt import api
from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS

CROPS = {
    "lucchi": np.s_[:, 128:640, 256:768],
    "vnc": np.s_[:],
}
WIDTHS_NM = (0, 10, 20, 25, 30, 40, 50)
THRESHOLDS = (0.4, 0.5, 0.6, 0.7)
KEPT = Path("scratch/starter")

Volume = npt.NDArray[np.float32]


def probability(name: str, plane: str, image: npt.NDArray[np.uint8]) -> Volume:
    """Foreground probability (Z, Y, X) of the planes across axis z or y, without averaging."""
    file = KEPT / f"{name}-{plane}.npy"
    if not file.is_file():
        model = api.load_model("starter")
        model.segmenter.spec = model.segmenter.spec.changed(smooth_z_nm=0.0)
        turned = image if plane == "z" else image.swapaxes(0, 1)
        found = api.segment(turned, model, DATASETS[name].voxel_nm, probabilities=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        np.save(file, (found if plane == "z" else found.swapaxes(0, 1)).astype(np.float16))
    return np.load(file).astype(np.float32)


def row(name: str, found: Volume, label: npt.NDArray[np.bool_]) -> None:
    """Print the IoU at each threshold."""
    masks = [found > threshold for threshold in THRESHOLDS]
    scores = [(mask & label).sum() / (mask | label).sum() for mask in masks]
    print(f"| {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")


def main(root: Path) -> None:
    """Print the table."""
    print("| averaged over | " + " | ".join(f"above {t}" for t in THRESHOLDS) + " |")
    print("|---" * (1 + len(THRESHOLDS)) + "|")
    for name, crop in CROPS.items():
        known = DATASETS[name]
        part = find_parts(root / name, known.layout, "number")[0]
        image = np.ascontiguousarray(part.images.read(0, part.depth)[crop])
        label = part.labels.read(0, part.depth)[crop] > int(known.foreground[1:])
        spacing = known.voxel_nm[0]
        z = probability(name, "z", image)
        for width in WIDTHS_NM:
            averaged = gaussian_filter1d(z, width / spacing, axis=0) if width else z
            row(f"{name}, {width} nm", averaged, label)
        if name == "lucchi":  # its voxels are cubes, so it can be seen from the side
            y = probability(name, "y", image)
            row("lucchi, mean of planes z and y", (z + y) / 2, label)
            both = [gaussian_filter1d(p, 30 / spacing, axis=k) for k, p in enumerate((z, y))]
            row("lucchi, the same, each averaged over 30 nm", (both[0] + both[1]) / 2, label)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
