"""Write some volumes of the hippocampus archive as a dataset of emadapt, layout `volumes`.

python studies/hippocampus/layout.py hippocampus_260.npz data/hippocampus

The first 33 volumes are for training and validation, the last 30 for testing. A slice is sagittal,
so that it shows both ends of the hippocampus.
"""

import sys
from pathlib import Path

import nibabel
import numpy as np

PARTS = {"train": slice(0, 33), "test": slice(-30, None)}


def main(archive: Path, out: Path) -> None:
    """train/ and test/, each with images/ and labels/ of one NIfTI file a volume."""
    arrays = np.load(archive)
    ids = sorted(name[4:] for name in arrays if name.startswith("img_"))
    to_ras = np.eye(4)[[2, 1, 0, 3]]  # the file's axes are (z, y, x), its slices those of x
    for part, chosen in PARTS.items():
        for folder, prefix in (("images", "img"), ("labels", "lab")):
            (out / part / folder).mkdir(parents=True)
            for name in ids[chosen]:
                image = nibabel.Nifti1Image(arrays[f"{prefix}_{name}"].T, to_ras)
                image.header.set_xyzt_units("mm")
                nibabel.save(image, out / part / folder / f"hippocampus_{name}.nii.gz")


main(Path(sys.argv[1]), Path(sys.argv[2]))
