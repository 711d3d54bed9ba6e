"""Synthetic electron microscopy: two domains that differ as FIB-SEM and serial-section TEM do.

A scene of `phantom_scene` is imaged with the voxels, blur, noise and section defects of a domain:
neighbouring slices are near copies at 5 nm and change a lot at 50 nm.

`python -m emadapt.data.phantom OUT` writes both domains under OUT, and `... OUT organelles` three
datasets whose labels tell organelles apart (`CLASSES`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

from emadapt.data.phantom_domains import ORGANELLES, Domain
from emadapt.data.phantom_scene import Array, Scene, Tube, make_scene
from emadapt.files import whole_file

Shape = tuple[int, int, int]
SHAPES: dict[str, dict[str, Shape]] = {
    "phantom_fib": {"train": (32, 320, 320), "test": (16, 320, 320)},
    "phantom_tem": {"train": (16, 320, 320), "test": (6, 320, 320)},
}
ORGANELLE_SHAPES: dict[str, dict[str, Shape]] = {
    name: {"train": (24, 256, 256), "test": (12, 256, 256)} for name in ORGANELLES
}
CLASSES = {"mitochondria": 1, "er": 2, "lipid_droplets": 3, "neurites": 4}
"""Label ids of `ORGANELLES`. Organelles are within neurites: `[1, 2, 3, 4]` are whole ones."""
CLASS_OF = {"mitochondrion": "mitochondria", "lipid": "lipid_droplets"}
"""Of kinds of tubes; other kinds are a part of the neurite."""


def make_volume(domain: str, shape: Shape, seed: int) -> tuple[Array, Array]:
    """Image a scene of a domain of `DOMAINS` or `ORGANELLES`, a function of the arguments alone.

    Returns:
        Image and label, both uint8 (Z, Y, X). The label has ids of `CLASSES` for domains of
        `ORGANELLES`, else 1 within the outer membrane of a mitochondrion.
    """
    scene = make_scene(domain, shape, seed)
    rng = np.random.default_rng([seed, *domain.encode(), 1])
    image, grain, label = _sections(scene, shape, rng)
    if domain not in ORGANELLES:
        label = (label == CLASSES["mitochondria"]).astype(np.uint8)
    return _exposed(scene.domain, image, grain, rng), label


def write_phantoms(
    root: Path, seed: int = 0, shapes: dict[str, dict[str, Shape]] = SHAPES
) -> list[Path]:
    """Write `root/<domain>/<train|test>/{image,label}.tif`: the same seed gives the same bytes."""
    files = []
    for domain, parts in shapes.items():
        for number, (part, shape) in enumerate(parts.items()):
            image, label = make_volume(domain, shape, 10 * seed + number)
            for name, array in (("image", image), ("label", label)):
                files.append(Path(root) / domain / part / f"{name}.tif")
                _write(files[-1], array, predictor=name == "image")
    return files


def _write(path: Path, array: Array, predictor: bool) -> None:
    """A deflated TIFF without dates."""
    with whole_file(path) as temporary:
        tifffile.imwrite(
            temporary,
            array,
            photometric="minisblack",
            compression="zlib",
            predictor=predictor,
            software=False,
            datetime=None,
            metadata=None,
        )


def _sections(scene: Scene, shape: Shape, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Grey values, strength of the grain, and ids of `CLASSES`, before the microscope."""
    d = scene.domain
    nz, ny, nx = shape
    image, grain, label = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.uint8)
    for i in range(nz):
        shift = rng.normal(0, d.jitter_px, 2)
        z = i * d.voxel_nm[0]
        y = (np.arange(ny) + shift[0]) * d.voxel_nm[1]
        x = (np.arange(nx) + shift[1]) * d.voxel_nm[2]
        for offset in d.slab_nm:  # a thick section is seen in projection
            grey, inside, rough = _plane(scene, z + offset, y, x)
            image[i] += grey / len(d.slab_nm)
            grain[i] += rough / len(d.slab_nm)
            if offset == 0:
                label[i] = inside
    return image, grain, label


def _exposed(d: Domain, image: Array, grain: Array, rng: np.random.Generator) -> Array:
    """What the microscope makes of the sections: texture, blur, shading, defects, noise."""
    nz, ny, nx = image.shape

    def texture(scale: Array | tuple[float, ...]) -> Array:
        """White noise, smoothed by a length in voxels per axis, with a standard deviation of 1."""
        t = ndimage.gaussian_filter(rng.normal(size=image.shape), scale, mode="wrap")
        return t / t.std()

    specks = texture(np.divide(d.grain_nm, d.voxel_nm))
    image += d.cloud * grain * texture(np.divide(d.cloud_nm, d.voxel_nm))
    # Grains are darker than their surroundings.
    image += d.grain * grain * (specks - 1.0 * np.maximum(-specks - 0.8, 0))
    image = ndimage.gaussian_filter(image, (d.blur_z, d.blur_px, d.blur_px), mode="nearest")
    image += d.shading * texture((d.blur_z * 6, ny / 6, nx / 6))
    for section in image:
        if rng.random() < d.defects:
            spoil_section(section, rng)
    image += d.noise * texture((0, d.noise_px, d.noise_px))
    gain = rng.normal(1, d.gain_sd, (nz, 1, 1))
    brightness = rng.normal(0, d.offset_sd, (nz, 1, 1))
    image = (image - image.mean()) * gain + image.mean() + brightness
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def spoil_section(image: Array, rng: np.random.Generator) -> None:
    """Fold the section (a dark winding band) or scratch it with a chipped knife, in place."""
    h, w = image.shape
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35) * min(h, w)
    yy, xx = np.mgrid[:h, :w] - np.array([h / 2, w / 2])[:, None, None]
    across = yy * np.cos(angle) + xx * np.sin(angle) - offset
    along = xx * np.cos(angle) - yy * np.sin(angle)
    if rng.random() < 0.5:
        winding = 7 * np.sin(along / rng.uniform(25, 60) + rng.uniform(0, 6))
        image *= 1 - 0.6 * _band(across - winding, rng.uniform(3, 6)) * _ramp(along, -0.3 * w, 0.0)
    else:
        image += 28 * _band(across, 1.5) - 28 * _band(across - 4, 1.5)


def _band(distance: Array, width: float) -> Array:
    """1 on a surface, falling to 0 within about two widths."""
    return np.exp(-((distance / width) ** 2))


def _ramp(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, linear between."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


class _Canvas:
    """One infinitely thin section while it is painted; arrays are (Y, X)."""

    def __init__(self, scene: Scene, z: float, y: Array, x: Array) -> None:
        shape = len(y), len(x)
        grid = np.broadcast_arrays(z, *np.meshgrid(y, x, indexing="ij"))
        self.z, self.y, self.x = z, y, x
        self.points = np.stack(grid, axis=-1)  # (Y, X, 3) nm
        warped = scene.warp.plane(z, y, x) + scene.wiggle.plane(z, y, x)
        border, cell = scene.membrane(self.points.reshape(-1, 3), 75.0, warped)
        self.border, self.cell = border.reshape(shape), cell.reshape(shape)
        self.mottle = scene.mottle.plane(z, y, x).reshape(*shape, -1)  # (Y, X, 7)
        self.image = scene.grey[self.cell] + 7.0 * self.mottle[..., 0]
        self.grain = 0.25 + 0.75 * _ramp(self.mottle[..., 6], -1.2, 1.0)
        self.label = np.zeros(shape, np.uint8)

    def window(self, low: Array, high: Array) -> tuple[slice, slice]:
        """Rows and columns between two points (y, x)."""
        rows = np.searchsorted(self.y, (low[0], high[0]))
        columns = np.searchsorted(self.x, (low[1], high[1]))
        return slice(*rows), slice(*columns)


def _plane(scene: Scene, z: float, y: Array, x: Array) -> tuple[Array, Array, Array]:
    """A section at z, rows y and columns x (nm) -> grey, ids of `CLASSES`, strength of grain."""
    canvas = _Canvas(scene, z, y, x)
    d, mottle, border = scene.domain, canvas.mottle, canvas.border
    canvas.label[border > d.cleft_nm + 1.5 * d.membrane_nm] = CLASSES["neurites"]
    _paint_reticulum(d, canvas)
    _paint_vesicles(scene, canvas)
    for tube in scene.tubes:
        _paint_tube(d, tube, canvas)
    wall = _band(border - d.cleft_nm, d.membrane_nm)
    layers = 0.55 + 0.45 * np.cos(border * 2 * np.pi / 15.0)
    wall += scene.sheath[canvas.cell] * (border < 62) * layers
    wall = np.clip(wall, 0, 1)
    canvas.image += (d.membrane - canvas.image) * wall
    canvas.grain *= 1 - 0.8 * wall
    synapse = _band(border, 26.0) * _ramp(mottle[..., 1], 1.1, 1.6)
    canvas.image += (d.membrane - canvas.image) * 0.75 * synapse
    return canvas.image, canvas.label, canvas.grain


def _paint_reticulum(d: Domain, canvas: _Canvas) -> None:
    """Sheets of endoplasmic reticulum, labelled with their membranes."""
    extent = canvas.mottle[..., 3]
    # nm from a level surface of the field, which is about as steep as that.
    sheet = np.abs(canvas.mottle[..., 2]) * 40.0
    strength = _band(sheet - 13.0, 6.0) * _ramp(extent, 0.7, 1.0) * _ramp(canvas.border, 18.0, 32.0)
    canvas.image += (d.vesicle - canvas.image) * 0.8 * strength
    canvas.label[(sheet < 19.0) & (extent > 0.85) & (canvas.border > 25.0)] = CLASSES["er"]


def _paint_vesicles(scene: Scene, canvas: _Canvas) -> None:
    d = scene.domain
    near = np.abs(scene.vesicles[:, 0] - canvas.z) < scene.vesicles[:, 3] + 6
    for vesicle in scene.vesicles[near]:
        centre, radius, dense = vesicle[:3], vesicle[3], vesicle[4]
        place = canvas.window(centre[1:] - (radius + 6), centre[1:] + (radius + 6))
        r = np.sqrt(((canvas.points[place] - centre) ** 2).sum(axis=-1))
        if dense:  # a black dot in a pale ring
            ink = _ramp(0.62 * radius - r, -4, 4) + 0.6 * _band(r - radius, 4.0)
            paper = _ramp(radius - r, -2, 2)
            canvas.image[place] += (d.cytosol + 10 - canvas.image[place]) * paper
        else:
            ink = _band(r - radius, 6.0) + 0.3 * _ramp(radius - r, -2, 2)
        canvas.image[place] += (d.vesicle - canvas.image[place]) * np.clip(ink, 0, 1)


def _paint_tube(d: Domain, tube: Tube, canvas: _Canvas) -> None:
    """Paint and label an organelle."""
    reach = tube.radii.max() + 6
    if np.abs(tube.centres[:, 0] - canvas.z).min() > reach:
        return
    low = tube.centres[:, 1:].min(axis=0) - reach
    place = canvas.window(low, tube.centres[:, 1:].max(axis=0) + reach)
    points = canvas.points[place]
    if points.size == 0:
        return
    shape = points.shape[:2]
    mottle = canvas.mottle[place].reshape(-1, canvas.mottle.shape[-1])
    distance, body, wall = _organelle(d, tube, points.reshape(-1, 3), mottle)
    body += (0.85 * d.membrane + 10.0 - body) * np.clip(wall, 0, 1)
    cover = _ramp(-distance, -3.0, 3.0).reshape(shape)
    canvas.image[place] += (body.reshape(shape) - canvas.image[place]) * cover
    rough = 0.3 if tube.kind == "dense" else 0.75
    canvas.grain[place] += (rough - canvas.grain[place]) * cover
    inside = (distance < 0).reshape(shape)
    canvas.label[place][inside] = CLASSES[CLASS_OF.get(tube.kind, "neurites")]


def _organelle(d: Domain, tube: Tube, p: Array, mottle: Array) -> tuple[Array, Array, Array]:
    """(N, 3) points -> signed distance in nm, grey of the inside, and strength of the membrane."""
    s, arc = tube.sdf(p)
    body = np.full(len(p), tube.grey) + 5.0 * mottle[:, 0]
    if tube.kind == "mitochondrion":
        period = 46.0 if tube.lengthwise else 40.0
        along = p @ tube.across if tube.lengthwise else arc
        phase = np.mod(along / period + 0.35 * mottle[:, 4], 1.0) - 0.5
        lamella = _band(phase * period, 6.0) * _ramp(mottle[:, 5], -0.7, 0.0)
        body += (d.crista - d.matrix) * (lamella * _ramp(-s, 20.0, 27.0))
        body += 30.0 * _band(s + 14.0, 4.5)  # between the two membranes
        return s, body, _band(s + 4.0, 5.0) + 0.7 * _band(s + 23.0, 5.0)
    if tube.kind in ("dense", "lipid"):
        return s, body, np.zeros(len(p))
    blobs = np.cos(p[:, 0] / 7.5 + mottle[:, 4]) * np.cos(p[:, 1] / 7.5 + mottle[:, 5])
    blobs *= np.cos(p[:, 2] / 7.5)  # small vesicles in a pale body
    body += (d.membrane - d.cytosol) * 0.6 * _ramp(blobs, 0.25, 0.7) * _ramp(-s, 8.0, 16.0)
    return s, body, _band(s + 4.0, 5.0)


def _main(words: list[str]) -> None:
    root, *kind = words or ["--help"]
    if root.startswith("-") or kind not in ([], ["organelles"]):
        sys.exit("usage: python -m emadapt.data.phantom OUT [organelles]")
    for file in write_phantoms(Path(root), shapes=ORGANELLE_SHAPES if kind else SHAPES):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    _main(sys.argv[1:])
