"""Write volumes of mitochondria that touch, with the number of each, in train/ and test/.

Run it at commit b916f16, the last with the generator that it changes:
`python volumes.py`. Each tube may reach 12 nm into another, and fills cells more than usual.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
from emadapt.data.phantom_domains import DOMAINS

from emadapt.data import phantom, phantom_scene

OVERLAP_NM = 12.0
FIRST = 10  # of the numbers; smaller ones are classes of the generator
DOMAINS["touch"] = replace(
    DOMAINS["phantom_fib"], cell_nm=900.0, big_cells=(0, 400.0), foreground=0.34, bodies=8.0
)
paint, make_scene = phantom._paint_tube, phantom_scene.make_scene


def clearance(scene, points):
    """Room around each point, where other tubes may be entered by OVERLAP_NM."""
    free = 0.8 * scene.membrane(points)[0]
    if scene.tubes:
        centres = np.concatenate([tube.centres for tube in scene.tubes])
        radii = np.concatenate([tube.radii for tube in scene.tubes])
        for i in range(0, len(points), 2000):
            some = np.s_[i : i + 2000]
            away = np.sqrt(((points[some, None] - centres) ** 2).sum(-1)) - radii
            free[some] = np.minimum(free[some], away.min(1) + phantom_scene.RIM_NM + OVERLAP_NM)
    return free


def numbered(domain, tube, canvas):
    """Paint a tube; its label is its number, where no other tube is."""
    before = canvas.label.copy()
    canvas.label[:] = 0
    paint(domain, tube, canvas)
    own = canvas.label == 1
    canvas.label = np.where(canvas.label == 0, before, 0).astype(np.uint8)
    if tube.kind == "mitochondrion":
        canvas.label[own] = tube.number


def scene_of(*arguments):
    """A scene whose tubes have numbers."""
    scene = make_scene(*arguments)
    for number, tube in enumerate(scene.tubes, FIRST):
        object.__setattr__(tube, "number", number)
    return scene


if __name__ == "__main__":
    phantom_scene.Scene.clearance, phantom._paint_tube = clearance, numbered
    for part, shape, seed in (("train", (48, 352, 352), 3), ("test", (64, 512, 512), 4)):
        scene = scene_of("touch", shape, seed)
        rng = np.random.default_rng([seed, *b"touch", 1])
        image, grain, label = phantom._sections(scene, shape, rng)
        image = phantom._exposed(scene.domain, image, grain, rng)
        folder = Path(part)
        folder.mkdir()
        for name, array in (("image", image), ("label", np.where(label >= FIRST, label, 0))):
            tifffile.imwrite(folder / f"{name}.tif", array, photometric="minisblack")
