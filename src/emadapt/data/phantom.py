"""Synthetic electron microscopy: two domains that differ as FIB-SEM and serial-section TEM do.

A scene of `emadapt.data.phantom_scene` is imaged with the voxels, blur, noise and section defects of a domain, so that
neighbouring slices are near copies at 5 nm and change a lot at 50 nm.

`python -m emadapt.data.phantom OUT` writes both domains under OUT. `python -m emadapt.data.phantom OUT noise=0.5 blur=1` writes
copies of the first domain, the same scenes imaged worse: a shift between datasets whose kind and dose are known.
`python -m emadapt.data.phantom OUT organelles` writes three datasets whose labels tell organelles apart (`CLASSES`).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

from emadapt.data.phantom_scene import ORGANELLES, Array, Domain, Scene, Tube, make_scene
from emadapt.errors import InputError

SHAPES: dict[str, dict[str, tuple[int, int, int]]] = {
    "phantom_fib": {"train": (32, 320, 320), "test": (16, 320, 320)},
    "phantom_tem": {"train": (16, 320, 320), "test": (6, 320, 320)},
}
ORGANELLE_SHAPES: dict[str, dict[str, tuple[int, int, int]]] = {
    name: {"train": (24, 256, 256), "test": (12, 256, 256)} for name in ORGANELLES
}
CLASSES = {"mitochondria": 1, "er": 2, "lipid_droplets": 3, "neurites": 4}
"""Label ids of `ORGANELLES`. Organelles lie within neurites: `neurites: [1, 2, 3, 4]` are whole ones, 4 alone is what is left."""

DIALS: dict[str, Callable[[Domain, float], Domain]] = {
    "contrast": lambda d, dose: dataclasses.replace(d, contrast=1 - 0.8 * dose),
    "noise": lambda d, dose: dataclasses.replace(d, noise=d.noise * (1 + 3 * dose)),
    "blur": lambda d, dose: dataclasses.replace(d, blur_px=d.blur_px + 3 * dose),
    "voxel": lambda d, dose: dataclasses.replace(
        d, voxel_nm=(d.voxel_nm[0], d.voxel_nm[1] * (1 + dose), d.voxel_nm[2] * (1 + dose))
    ),
    "texture": lambda d, dose: dataclasses.replace(
        d, grain=d.grain * (1 + 4 * dose), grain_nm=d.grain_nm * (1 + dose)
    ),
}
"""Shifts by name: domain, dose (0: none, 1: the most) -> domain. Contrast falls to a fifth, the detector's noise
rises fourfold, the point spread by 3 px, pixels become twice as wide, the stain's grain five times as strong, twice as coarse."""
DIALLED = {"train": (16, 320, 320), "test": (16, 320, 320)}


def _band(distance: Array, width: float) -> Array:
    """1 on a surface, falling to 0 within about two widths."""
    return np.exp(-((distance / width) ** 2))


def _ramp(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, linear between."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def _paint_tube(
    d: Domain, tube: Tube, p: Array, mottle: Array, image: Array, grain: Array
) -> Array:
    """Paint an organelle over the points; changes image and grain, returns which points are inside its membrane."""
    s, arc = tube.sdf(p)
    inside = s < 0
    body = np.full(len(p), tube.grey) + 5.0 * mottle[:, 0]
    if tube.kind == "mitochondrion":
        period = 46.0 if tube.lengthwise else 40.0
        along = p @ tube.across if tube.lengthwise else arc
        phase = np.mod(along / period + 0.35 * mottle[:, 4], 1.0) - 0.5
        lamella = (
            _band(phase * period, 6.0) * _ramp(mottle[:, 5], -0.7, 0.0) * _ramp(-s, 20.0, 27.0)
        )
        body += (d.crista - d.matrix) * lamella
        body += 30.0 * _band(s + 14.0, 4.5)  # between the two membranes
        wall = _band(s + 4.0, 5.0) + 0.7 * _band(s + 23.0, 5.0)
    elif tube.kind in ("dense", "lipid"):
        wall = np.zeros(len(p))
    else:  # small vesicles in a pale body
        blobs = (
            np.cos(p[:, 0] / 7.5 + mottle[:, 4])
            * np.cos(p[:, 1] / 7.5 + mottle[:, 5])
            * np.cos(p[:, 2] / 7.5)
        )
        body += (d.membrane - d.cytosol) * 0.6 * _ramp(blobs, 0.25, 0.7) * _ramp(-s, 8.0, 16.0)
        wall = _band(s + 4.0, 5.0)
    body += (0.85 * d.membrane + 10.0 - body) * np.clip(wall, 0, 1)
    cover = _ramp(-s, -3.0, 3.0)
    image += (body - image) * cover
    grain += ((0.3 if tube.kind == "dense" else 0.75) - grain) * cover
    return inside


def _plane(scene: Scene, z: float, y: Array, x: Array) -> tuple[Array, Array, Array]:
    """One infinitely thin section at z, rows y and columns x (nm) -> grey, ids of `CLASSES`, strength of the grain: (Y, X)."""
    d, shape = scene.domain, (len(y), len(x))
    p = np.stack(np.broadcast_arrays(z, *np.meshgrid(y, x, indexing="ij")), axis=-1).reshape(-1, 3)
    border, cell = scene.membrane(p, 75.0, scene.warp.plane(z, y, x) + scene.wiggle.plane(z, y, x))
    mottle = scene.mottle.plane(z, y, x)
    image = scene.grey[cell] + 7.0 * mottle[:, 0]
    grain = 0.25 + 0.75 * _ramp(mottle[:, 6], -1.2, 1.0)

    sheet = (
        np.abs(mottle[:, 2]) * 40.0
    )  # nm from a level surface of the field, which is about as steep as that
    reticulum = _band(sheet - 13.0, 6.0) * _ramp(mottle[:, 3], 0.7, 1.0) * _ramp(border, 18.0, 32.0)
    image += (d.vesicle - image) * 0.8 * reticulum

    def window(centre: Array, radius: float) -> tuple[slice, slice]:
        """Rows and columns that a ball can touch."""
        (y0, y1), (x0, x1) = (
            np.searchsorted(a, (c - radius, c + radius))
            for a, c in ((y, centre[1]), (x, centre[2]))
        )
        return slice(y0, y1), slice(x0, x1)

    grid, image2, grain2 = p.reshape(*shape, 3), image.reshape(shape), grain.reshape(shape)  # views
    for v in scene.vesicles[np.abs(scene.vesicles[:, 0] - z) < scene.vesicles[:, 3] + 6]:
        rows, columns = window(v, v[3] + 6)
        r = np.sqrt(((grid[rows, columns] - v[:3]) ** 2).sum(axis=-1))
        if v[4]:  # dense core: a black dot in a pale ring
            ink, paper = (
                _ramp(0.62 * v[3] - r, -4, 4) + 0.6 * _band(r - v[3], 4.0),
                _ramp(v[3] - r, -2, 2),
            )
            image2[rows, columns] += (d.cytosol + 10 - image2[rows, columns]) * paper
        else:
            ink = _band(r - v[3], 6.0) + 0.3 * _ramp(v[3] - r, -2, 2)
        image2[rows, columns] += (d.vesicle - image2[rows, columns]) * np.clip(ink, 0, 1)

    label = np.where(border > d.cleft_nm + 1.5 * d.membrane_nm, CLASSES["neurites"], 0).astype(
        np.uint8
    )
    label[(sheet < 19.0) & (mottle[:, 3] > 0.85) & (border > 25.0)] = CLASSES[
        "er"
    ]  # with its membranes
    label = label.reshape(shape)
    for tube in scene.tubes:
        reach = tube.radii.max() + 6
        if np.abs(tube.centres[:, 0] - z).min() > reach:
            continue
        (y0, x0), (y1, x1) = (
            tube.centres[:, 1:].min(axis=0) - reach,
            tube.centres[:, 1:].max(axis=0) + reach,
        )
        rows, columns = slice(*np.searchsorted(y, (y0, y1))), slice(*np.searchsorted(x, (x0, x1)))
        part = grid[rows, columns]
        if part.size == 0:
            continue
        piece, rough = image2[rows, columns].ravel(), grain2[rows, columns].ravel()
        m = mottle.reshape(*shape, -1)[rows, columns].reshape(-1, mottle.shape[1])
        inside = _paint_tube(d, tube, part.reshape(-1, 3), m, piece, rough).reshape(part.shape[:2])
        image2[rows, columns], grain2[rows, columns] = (
            piece.reshape(inside.shape),
            rough.reshape(inside.shape),
        )
        label[rows, columns][inside] = CLASSES[
            {"mitochondrion": "mitochondria", "lipid": "lipid_droplets"}.get(tube.kind, "neurites")
        ]

    wall = _band(border - d.cleft_nm, d.membrane_nm)
    wall += scene.sheath[cell] * (border < 62) * (0.55 + 0.45 * np.cos(border * 2 * np.pi / 15.0))
    wall = np.clip(wall, 0, 1)
    image += (d.membrane - image) * wall
    grain *= 1 - 0.8 * wall
    synapse = _band(border, 26.0) * _ramp(mottle[:, 1], 1.1, 1.6)
    image += (d.membrane - image) * 0.75 * synapse
    return image2, label, grain2


def _spoil_section(image: Array, rng: np.random.Generator) -> None:
    """Fold the section or cut it with a chipped knife, in place: a dark winding band or a bright and dark scratch."""
    h, w = image.shape
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35) * min(h, w)
    yy, xx = np.mgrid[:h, :w] - np.array([h / 2, w / 2])[:, None, None]
    across, along = (
        yy * np.cos(angle) + xx * np.sin(angle) - offset,
        xx * np.cos(angle) - yy * np.sin(angle),
    )
    if rng.random() < 0.5:
        winding = 7 * np.sin(along / rng.uniform(25, 60) + rng.uniform(0, 6))
        image *= 1 - 0.6 * _band(across - winding, rng.uniform(3, 6)) * _ramp(along, -0.3 * w, 0.0)
    else:
        image += 28 * _band(across, 1.5) - 28 * _band(across - 4, 1.5)


def make_volume(
    domain: str, shape: tuple[int, int, int], seed: int, dial: str = "", dose: float = 0.0
) -> tuple[Array, Array]:
    """Image a scene.

    Args:
        domain: a key of `DOMAINS` or `ORGANELLES`.
        shape: z, y, x voxels.
        seed: of the scene and of the noise; the same arguments give the same arrays.
        dial: a key of `DIALS`: what is imaged worse, the scene staying as it is; empty: nothing.
        dose: how much, 0 to 1.

    Returns:
        The image, uint8 (Z, Y, X; larger pixels make fewer), and the label, uint8 of the same shape: ids of `CLASSES` for
        domains of `ORGANELLES`, else 0/1: 1 within the outer membrane of a mitochondrion.
    """
    scene = make_scene(domain, shape, seed)
    d = DIALS[dial](scene.domain, dose) if dial else scene.domain
    ny, nx = (
        round(n * a / b)
        for n, a, b in zip(shape[1:], scene.domain.voxel_nm[1:], d.voxel_nm[1:], strict=True)
    )
    nz, shape = shape[0], (shape[0], ny, nx)
    rng = np.random.default_rng([seed, *domain.encode(), 1])
    image, grain = np.zeros(shape), np.zeros(shape)
    label = np.zeros(shape, np.uint8)
    for i in range(nz):
        shift = rng.normal(0, d.jitter_px, 2)
        z, y, x = (
            i * d.voxel_nm[0],
            (np.arange(ny) + shift[0]) * d.voxel_nm[1],
            (np.arange(nx) + shift[1]) * d.voxel_nm[2],
        )
        for offset in d.slab_nm:
            grey, inside, rough = _plane(scene, z + offset, y, x)
            image[i] += grey / len(d.slab_nm)
            grain[i] += rough / len(d.slab_nm)
            if offset == 0:
                label[i] = inside if domain in ORGANELLES else inside == CLASSES["mitochondria"]

    def texture(scale: Array | tuple[float, ...]) -> Array:
        """White noise, smoothed by a length in voxels per axis, with a standard deviation of 1."""
        t = ndimage.gaussian_filter(rng.normal(size=shape), scale, mode="wrap")
        return t / t.std()

    specks = texture(np.divide(d.grain_nm, d.voxel_nm))
    image += d.cloud * grain * texture(np.divide(d.cloud_nm, d.voxel_nm))
    image += (
        d.grain * grain * (specks - 1.0 * np.maximum(-specks - 0.8, 0))
    )  # grains are darker than their surroundings
    image = ndimage.gaussian_filter(image, (d.blur_z, d.blur_px, d.blur_px), mode="nearest")
    image += d.shading * texture((d.blur_z * 6, ny / 6, nx / 6))
    for section in image:
        if rng.random() < d.defects:
            _spoil_section(section, rng)
    image += d.noise * texture((0, d.noise_px, d.noise_px))
    gain, brightness = rng.normal(1, d.gain_sd, (nz, 1, 1)), rng.normal(0, d.offset_sd, (nz, 1, 1))
    image = (image - image.mean()) * gain * d.contrast + image.mean() + brightness
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def write_phantoms(
    root: Path, seed: int = 0, shapes: dict[str, dict[str, tuple[int, int, int]]] = SHAPES
) -> list[Path]:
    """Write `root/<domain>/<train|test>/{image,label}.tif`, deflated, without dates: the same seed gives the same bytes.

    Train and test are different scenes of one domain. Returns the files written.
    """
    return [
        file
        for domain, parts in shapes.items()
        for number, (part, shape) in enumerate(parts.items())
        for file in _write(
            Path(root) / domain / part, make_volume(domain, shape, 10 * seed + number)
        )
    ]


def write_dialled(
    root: Path,
    dial: str,
    dose: float,
    seed: int = 0,
    shapes: dict[str, tuple[int, int, int]] = DIALLED,
) -> list[Path]:
    """Write `root/dialled_<dial>_<percent>/<train|test>/`, as `write_phantoms` does; the scenes are those of `phantom_fib`.

    Raises:
        InputError: an unknown dial, or a dose that is not in [0, 1].
    """
    if dial not in DIALS or not 0 <= dose <= 1:
        raise InputError(
            f"shift {dial}={dose}",
            found="one that cannot be made",
            expected=f"{', '.join(DIALS)} from 0 to 1",
            do="Write e.g. noise=0.5.",
        )
    folder = Path(root) / f"dialled_{dial}_{round(100 * dose)}"
    return [
        file
        for number, (part, shape) in enumerate(shapes.items())
        for file in _write(
            folder / part, make_volume("phantom_fib", shape, 10 * seed + number, dial, dose)
        )
    ]


def _write(folder: Path, arrays: tuple[Array, Array]) -> list[Path]:
    """image.tif and label.tif."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, array in zip(("image", "label"), arrays, strict=True):
        path, temporary = folder / f"{name}.tif", folder / f".{name}.tif.part"
        tifffile.imwrite(
            temporary,
            array,
            photometric="minisblack",
            compression="zlib",
            predictor=name == "image",
            software=False,
            datetime=None,
            metadata=None,
        )
        temporary.replace(path)
        written.append(path)
    return written


def _main(words: list[str]) -> None:
    if not words or words[0].startswith("-"):  # `--help` is a question, not a folder
        sys.exit("usage: python -m emadapt.data.phantom OUT [organelles | DIAL=DOSE ...]")
    root, *shifts = words
    if shifts in ([], ["organelles"]):
        files = write_phantoms(Path(root), shapes=ORGANELLE_SHAPES if shifts else SHAPES)
    else:
        made = [
            write_dialled(Path(root), dial, float(dose))
            for dial, _, dose in (s.partition("=") for s in shifts)
        ]
        files = list(itertools.chain(*made))
    for file in files:
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    _main(sys.argv[1:])
