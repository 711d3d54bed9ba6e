"""What four labelled slices add to the model that ships.

`python studies/starter/tune.py [FOLDER]` runs `emadapt tune` on Lucchi's training half and on VNC
from FOLDER (default `data`). It prints the number of scored slices, the IoU before and after, each
with one look (`--fast`) and with two, and the time of `tune`. Scored are a crop of Lucchi's test
half, and the sections of VNC that have no label. Its files are in scratch/starter/.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import tifffile
from smooth import CROPS

from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS

LABELLED = {"lucchi": (20, 60, 100, 140), "vnc": (2, 7, 12, 17)}
SHOWN = Path("scratch/starter")


def emadapt(*words: object) -> None:
    """Run a command of emadapt."""
    subprocess.run([sys.executable, "-m", "emadapt", *map(str, words)], check=True)


def main(root: Path) -> None:
    """Print a line for each dataset."""
    for name, chosen in LABELLED.items():
        known, folder = DATASETS[name], SHOWN / name
        labels, model = folder / "labels", folder / "tuned"
        labels.mkdir(parents=True, exist_ok=True)
        parts = find_parts(root / name, known.layout, "number")
        first, last = parts[0], parts[-1]  # one and the same of VNC
        stated = "--overwrite", "--voxel-nm", *known.voxel_nm
        above = int(known.foreground[1:])
        tifffile.imwrite(folder / "volume.tif", first.images.read(0, first.depth))
        for z in chosen:
            tifffile.imwrite(labels / f"{z:04d}.tif", first.labels.read(z, z + 1)[0])
        started = time.perf_counter()
        emadapt(
            "tune", folder / "volume.tif", labels, "-o", model, "--foreground", f">{above}", *stated
        )
        seconds = time.perf_counter() - started

        image = last.images.read(0, last.depth)[CROPS[name]]
        label = last.labels.read(0, last.depth)[CROPS[name]] > above
        tifffile.imwrite(folder / "test.tif", image)
        unseen = [z for z in range(last.depth) if last is not first or z not in chosen]
        scores = []
        for used, fast in itertools.product(("starter", model), (["--fast"], [])):
            words = "--model", used, *stated, *fast
            emadapt("segment", folder / "test.tif", folder / "mask.tif", *words)
            mask = tifffile.imread(folder / "mask.tif") > 0
            both, either = (mask & label)[unseen].sum(), (mask | label)[unseen].sum()
            scores.append(f"{both / either:.3f}")
        print(f"| {name} | {len(unseen)} | {' | '.join(scores)} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
