"""Draw docs/img/synthetic.png: a crop of each of 24 synthetic domains, 1.5 microns wide."""

from pathlib import Path

import numpy as np
from PIL import Image

from emadapt.data.synthetic import make_domain
from emadapt.data.tiles import Grey

SIDE, COLUMNS = 144, 6


def crop(number: int) -> Grey:
    """The middle of a section of domain `number`."""
    image, _, (_, pixel, _) = make_domain(0, number, 1, 2300.0)
    half, middle = round(750 / pixel), image.shape[1] // 2
    cut = Image.fromarray(image[0][middle - half : middle + half, middle - half : middle + half])
    low, high = np.percentile(cut, (0.5, 99.5))
    small = np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
    stretched = np.clip((small - low) / max(high - low, 1), 0, 1)
    return (np.round(stretched * 31) * (255 / 31)).astype(np.uint8)  # few greys, a small file


rows = [np.hstack([crop(COLUMNS * row + k) for k in range(COLUMNS)]) for row in range(4)]
path = Path(__file__).parents[2] / "docs/img/synthetic.png"
Image.fromarray(np.vstack(rows)).save(path, optimize=True)
print(path, f"{path.stat().st_size / 1e3:.0f} kB")
