"""Synthetic EM of random domains: each has a tissue, a stain and a microscope of its own.

A domain is a function of its number and the seed alone; sections are drawn one by one, with the
pixels of the microscope. A dataset of `layout: synthetic` is made of such domains at ingest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from emadapt.data.pairing import Part
from emadapt.data.synthetic_organelles import band, ramp
from emadapt.data.synthetic_paint import paint
from emadapt.data.synthetic_recipes import Rng, draw_stain, draw_tissue
from emadapt.data.synthetic_tissue import Array, make_block
from emadapt.errors import InputError
from emadapt.files import whole_file
from emadapt.volumes.grey import PERCENTILES
from emadapt.volumes.source import Source
from emadapt.volumes.voxel import Voxel

Grey = npt.NDArray[np.uint8]
DEPTH, SIDE = 2, 384
"""Sections of a domain in a dataset, and pixels of their sides."""
WRITTEN = (12, 3000.0)
"""Sections of a volume that `emadapt synthesise` writes, and nm of their sides."""
DRAWN_NM = 5.0
"""Tissue is drawn with pixels of this size or larger: nothing in it is sharper."""


def synthetic_parts(domains: int, seed: int, voxel_nm: Voxel) -> list[Part]:
    """A part of `DEPTH` slices for each domain, at `voxel_nm`, made when it is read.

    Grey values span 0 to 255, as those of 16 bits do after ingest; mitochondria are 255.
    """
    shape = DEPTH, SIDE, SIDE

    def part(number: int) -> Part:
        def source(which: int) -> Source:
            def cut(z0: int, z1: int, y0: int, y1: int) -> Grey:
                return at_pixel(seed, number, voxel_nm[1])[which][z0:z1, y0:y1]

            name = f"synthetic domain {number} of seed {seed}"
            return Source(name, shape, np.dtype(np.uint8), voxel_nm, DEPTH, cut, [seed, number])

        return Part("all", source(0), source(1))

    return [part(number) for number in range(domains)]


@functools.lru_cache(maxsize=2)
def at_pixel(seed: int, number: int, pixel_nm: float) -> tuple[Grey, Grey]:
    """Image and label (DEPTH, SIDE, SIDE) of a domain, resampled to `pixel_nm`."""
    image, label, _ = make_domain(seed, number, DEPTH, SIDE * pixel_nm)
    low, high = np.percentile(image, PERCENTILES)
    stretched = np.clip((image - low) * (255 / max(high - low, 1)), 0, 255).astype(np.uint8)

    def resized(array: Grey, how: Image.Resampling) -> Grey:
        return np.stack([np.asarray(Image.fromarray(a).resize((SIDE, SIDE), how)) for a in array])

    return (
        resized(stretched, Image.Resampling.BICUBIC),
        resized(255 * label, Image.Resampling.NEAREST),
    )


def write_domains(out: Path, domains: int, seed: int) -> list[Path]:
    """Write `out/NNN/{image,label}.tif` for each domain, ImageJ TIFFs that state their voxels.

    Raises:
        InputError: there is something in `out`.
    """
    import tifffile

    if out.is_file() or any(out.glob("*")):
        expected, do = "a new or an empty folder", "Choose another one."
        raise InputError(out, found="files", expected=expected, do=do)
    files = []
    for number in range(domains):
        image, label, voxel = make_domain(seed, number, *WRITTEN)
        z, y, x = (size / 1e3 for size in voxel)
        about: dict[str, Any] = {
            "imagej": True,
            "compression": "zlib",
            "resolution": (1 / x, 1 / y),
            "metadata": {"axes": "ZYX", "spacing": z, "unit": "um"},
        }
        folder = out / f"{number:03d}"
        for name, array in (("image", image), ("label", label)):
            files.append(folder / f"{name}.tif")
            with whole_file(files[-1]) as temporary:
                tifffile.imwrite(temporary, array, **about)
    return files


@dataclass(frozen=True)
class Microscope:
    """How sections are cut and imaged; lengths in nm, or in pixels where they say px."""

    pixel_nm: float
    section_nm: float
    projected: int  # planes of a section that are seen on top of each other
    grey: float  # of the cytosol
    contrast: float  # grey values between cytosol and membrane
    gamma: float
    grain: float  # sd of the texture of proteins and ribosomes, in units of contrast
    grain_nm: float
    cloud: float  # sd of a coarser texture
    blur_px: float
    noise: float  # sd, grey values
    noise_px: float  # its correlation
    shading: float  # sd, grey values
    stripes: float  # sd of curtains of the ion beam, grey values
    jitter_px: float
    defects: float  # share of the sections that are folded or scratched
    charging: float  # share of the sections with bright or dark patches
    offset_sd: float  # brightness of sections


def draw_microscope(rng: Rng) -> Microscope:
    """Pixels of 3 to 16 nm; sections of 4 to 60 nm, at half of the domains as thick as pixels."""
    pixel = float(np.exp(rng.uniform(np.log(3), np.log(16))))
    cut = rng.random() < 0.5  # serial sections, or a face that is imaged block by block
    section = rng.uniform(25, 60) if cut else np.clip(pixel * rng.choice([1, 1, 2, 3]), 4, 60)
    contrast = rng.uniform(45, 130)
    return Microscope(
        pixel_nm=pixel,
        section_nm=float(section),
        projected=2 if cut else 1,
        grey=rng.uniform(max(110, contrast + 15), 205),
        contrast=contrast,
        gamma=float(np.exp(rng.normal(0, 0.2))),
        grain=rng.uniform(0.04, 0.28),
        grain_nm=rng.uniform(4, 13),
        cloud=rng.uniform(0.0, 0.12),
        blur_px=rng.uniform(0.4, 1.5),
        noise=contrast * float(np.exp(rng.uniform(np.log(0.03), np.log(0.3)))),
        noise_px=rng.choice([0.0, 0.0, rng.uniform(0.4, 1.0)]),
        shading=rng.uniform(0, 12),
        stripes=rng.choice([0.0, 0.0, rng.uniform(1, 6)]),
        jitter_px=rng.uniform(0, 1.5) if cut else 0.15,
        defects=0.15 if cut else 0.03,
        charging=rng.choice([0.0, 0.0, 0.3]),
        offset_sd=rng.uniform(0, 6),
    )


def make_domain(seed: int, number: int, depth: int, side_nm: float) -> tuple[Grey, Grey, Voxel]:
    """Image and label of `depth` sections of about `side_nm`, and the voxel (z, y, x) in nm."""
    rng = np.random.default_rng([seed, number])
    scope, stain, tissue = draw_microscope(rng), draw_stain(rng), draw_tissue(number, rng)
    drawn_nm = max(scope.pixel_nm, DRAWN_NM)
    side = round(side_nm / drawn_nm)
    thick = depth * scope.section_nm
    block = make_block(tissue, stain, np.array([thick, side_nm, side_nm]), rng)
    image, grain = np.zeros((depth, side, side)), np.zeros((depth, side, side))
    label = np.zeros(image.shape, np.uint8)
    grid = np.arange(side) * drawn_nm
    for i in range(depth):
        shift = rng.normal(0, scope.jitter_px, 2) * scope.pixel_nm
        for k in range(scope.projected):
            z = (i + 0.3 * k) * scope.section_nm
            canvas = paint(block, z, grid + shift[0], grid + shift[1])
            image[i] += canvas.image / scope.projected
            grain[i] += canvas.grain / scope.projected
            if k == 0:
                label[i] = canvas.label
    voxel = (scope.section_nm, scope.pixel_nm, scope.pixel_nm)
    if drawn_nm > scope.pixel_nm:
        finer = (1, drawn_nm / scope.pixel_nm, drawn_nm / scope.pixel_nm)
        image, grain, label = (ndimage.zoom(a, finer, order=1) for a in (image, grain, label))
    return expose(scope, image, grain, rng), label, voxel


def expose(m: Microscope, image: Array, grain: Array, rng: Rng) -> Grey:
    """What the microscope makes of sections in units of contrast: 8 bits."""
    voxel = np.array([m.section_nm, m.pixel_nm, m.pixel_nm])

    def texture(scale: object) -> Array:
        t = ndimage.gaussian_filter(rng.normal(size=image.shape), scale, mode="wrap")
        return t / t.std()

    specks = texture(m.grain_nm / voxel)
    image = image + m.grain * grain * (specks - np.maximum(-specks - 0.8, 0))
    image += m.cloud * grain * texture(3 * m.grain_nm / voxel)
    image = ndimage.gaussian_filter(image, (0, m.blur_px, m.blur_px), mode="nearest")
    image = m.grey + m.contrast * image
    image = 255 * np.clip(image / 255, 0.001, 1.3) ** m.gamma
    h, w = image.shape[1:]
    image += m.shading * ndimage.zoom(rng.normal(size=(5, 5)), (h / 5, w / 5), order=3)
    curtains = ndimage.gaussian_filter1d(rng.normal(size=(len(image), 1, w)), 1.0)
    image += m.stripes * curtains / curtains.std()
    for section in image:
        if rng.random() < m.defects:
            spoil_section(section, rng)
        if rng.random() < m.charging:
            spots = ndimage.gaussian_filter(rng.normal(size=(h, w)), (h / 30, w / 8))
            section += 45 * rng.choice([-1, 1]) * np.clip(spots / spots.std() - 1.2, 0, 1.5)
    image += m.noise * texture((0, m.noise_px, m.noise_px))
    image += rng.normal(0, m.offset_sd, (len(image), 1, 1))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def spoil_section(image: Array, rng: Rng) -> None:
    """Fold the section (a dark winding band) or scratch it with a chipped knife, in place."""
    h, w = image.shape
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35) * min(h, w)
    yy, xx = np.mgrid[:h, :w] - np.array([h / 2, w / 2])[:, None, None]
    across = yy * np.cos(angle) + xx * np.sin(angle) - offset
    along = xx * np.cos(angle) - yy * np.sin(angle)
    if rng.random() < 0.5:
        winding = 7 * np.sin(along / rng.uniform(25, 60) + rng.uniform(0, 6))
        image *= 1 - 0.6 * band(across - winding, rng.uniform(3, 6)) * ramp(along, -0.3 * w, 0.0)
    else:
        image += 28 * band(across, 1.5) - 28 * band(across - 4, 1.5)
