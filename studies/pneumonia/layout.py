"""Write the images of a MedMNIST archive as a dataset of emadapt.

python studies/pneumonia/layout.py pneumoniamnist.npz data/pneumonia
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("normal", "pneumonia")


def main(archive: Path, out: Path) -> None:
    """images.csv with the official split, and the images as PNG."""
    arrays = np.load(archive)
    out.mkdir(parents=True)
    with (out / "images.csv").open("w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(("file", "label", "split"))
        for part in ("train", "val", "test"):
            pairs = zip(arrays[f"{part}_images"], arrays[f"{part}_labels"].ravel(), strict=True)
            for n, (image, label) in enumerate(pairs):
                file = f"{part}-{n:05d}.png"
                Image.fromarray(image).save(out / file)
                table.writerow((file, NAMES[label], part))


main(Path(sys.argv[1]), Path(sys.argv[2]))
