"""Organelles of synthetic EM, one function each: what a section through them looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from emadapt.data.synthetic_recipes import Stain
from emadapt.data.synthetic_tissue import Array, Block, Body


def band(distance: Array, width: float) -> Array:
    """1 on a surface, falling to 0 within about two widths."""
    return np.exp(-((distance / width) ** 2))


def ramp(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, linear between."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


@dataclass
class Canvas:
    """A section while it is painted; arrays are (Y, X), lengths in nm.

    Attributes:
        points: (Y, X, 3).
        border: to the border of the cell, and `cell` its number.
        fine, middle, coarse: (Y, X, C) random fields.
        image: 0 is the cytosol, -1 a membrane.
        grain: strength of the texture.
        label: mitochondria, with their outer membranes.
        near: to the nearest organelle.
    """

    points: Array
    border: Array
    cell: Array
    fine: Array
    middle: Array
    coarse: Array
    image: Array
    grain: Array
    label: Array
    near: Array

    def mix(self, value: Array | float, weight: Array) -> None:
        """Paint over what is there: 1 covers it."""
        self.image += (value - self.image) * weight

    def calm(self, grain: float, weight: Array) -> None:
        """The same for the grain."""
        self.grain += (grain - self.grain) * weight

    def part(self, low: Array, high: Array, reach: float) -> Canvas:
        """The part between two points (y, x) and so many nm around: views of the same arrays."""
        y, x = self.points[:, 0, 1], self.points[0, :, 2]
        rows, columns = (
            slice(*np.searchsorted(axis, (low[k] - reach, high[k] + reach)))
            for k, axis in enumerate((y, x))
        )
        return Canvas(*(getattr(self, f.name)[rows, columns] for f in fields(self)))


@dataclass(frozen=True)
class Cut:
    """A section through an organelle.

    Attributes:
        body: the organelle, in a tissue of this stain.
        canvas: the part of the section around it.
        s: (Y, X) nm from its surface, negative inside, and `along` its length.
    """

    body: Body
    stain: Stain
    canvas: Canvas
    s: Array
    along: Array

    def fill(self, value: Array | float, grain: float) -> None:
        """Cover the inside."""
        self.canvas.mix(value, cover := ramp(-self.s, -3, 3))
        self.canvas.calm(grain, cover)

    def membrane(self, depth: float, width: float, strength: Array | float = 0.9) -> None:
        """A membrane so many nm below the surface."""
        self.canvas.mix(-1.0, strength * band(self.s + depth, width))


def draw_body(block: Block, body: Body, canvas: Canvas, z: float) -> None:
    """Paint an organelle, and label it if it is a mitochondrion."""
    low = np.minimum(body.starts, body.ends).min(axis=0)
    high = np.maximum(body.starts, body.ends).max(axis=0)
    if not low[0] - body.reach < z < high[0] + body.reach:
        return
    hug = 260.0 if block.tissue.hugging else 20.0
    part = canvas.part(low[1:], high[1:], body.reach + hug)
    if part.image.size == 0:
        return
    s, along = body.sdf(part.points)
    size = float(body.radii.mean())
    bumps = part.middle if size < 500 else part.coarse
    s = s + min(LUMPY.get(body.kind, 0.03) * size, 120.0) * bumps[..., 3]
    np.minimum(part.near, s, out=part.near)
    PAINTERS[body.kind](Cut(body, block.stain, part, s, along))
    if body.kind == "mitochondrion":
        part.label |= s < 0


def _mitochondrion(cut: Cut) -> None:
    c, s, stain, u = cut.canvas, cut.s, cut.stain, cut.body.u
    matrix = stain.matrix + stain.matrix_sd * 3.4 * (u[3] - 0.5)
    cut.fill(matrix + 0.05 * c.fine[..., 3] + 0.05 * c.middle[..., 0], 0.6)
    period = 34 + 60 * u[4] ** 2
    bent = 0.3 * c.middle[..., 4] + 0.12 * c.fine[..., 4]
    if u[5] < 0.6:  # lamellae in one direction
        phase = c.points @ cut.body.axis / period + bent
    elif u[5] < 0.8:  # across the length
        phase = cut.along / period + bent
    else:  # in whorls, or irregular
        phase = s / period + 1.6 * c.middle[..., 4] + 0.3 * c.fine[..., 4]
    d = (np.mod(phase, 1) - 0.5) * period
    if u[6] < 0.2:  # tubes, cut across
        other = np.mod(c.points @ np.roll(cut.body.axis, 1) / period + bent, 1) - 0.5
        d = np.hypot(d, other * period)
    most = -1.8 + 1.9 * u[7]  # some have cristae all over, some a few
    inner = ramp(-s, 18, 26) * ramp(c.fine[..., 2] + c.middle[..., 2], most, most + 0.6)
    if (u[1] + u[5]) % 1 < stain.sealed:
        c.mix(stain.crista, 0.9 * band(d, 7.0) * inner)
    else:
        half = 7.0 + 6.0 * u[2]
        c.mix(stain.core, ramp(half - np.abs(d), -2, 4) * inner)
        c.mix(stain.crista, 0.8 * band(np.abs(d) - half, 5.0) * inner)
    c.mix(stain.gap, 0.8 * band(s + 13, 5.0))
    cut.membrane(4, 0.8 * stain.membrane_nm)
    cut.membrane(22, 5.5, 0.65)


def _lysosome(cut: Cut) -> None:
    """Dark, of any content: even, in clumps, with membranes in whorls, with fat."""
    c, s, u = cut.canvas, cut.s, cut.body.u
    grey = cut.stain.lysosome * (0.5 + 0.7 * u[3])
    cut.fill(grey, 1.0)
    if u[4] < 0.4:
        clumps = ramp(c.fine[..., 0] + c.middle[..., 1], 0.6, 0.9)
        c.mix(0.2, clumps * ramp(-s, 10, 18))
    elif u[4] < 0.65:
        whorl = np.cos(s * 2 * np.pi / (22 + 20 * u[5]) + 0.8 * c.fine[..., 1])
        c.mix(grey + 0.55, ramp(whorl, 0.0, 0.6) * ramp(-s, 8, 16))
    if u[6] < 0.35:
        c.mix(0.3, ramp(c.middle[..., 3], 0.7, 0.8) * ramp(-s, 12, 18))
    cut.membrane(4, cut.stain.membrane_nm)


def _granule(cut: Cut) -> None:
    """Secretory: even content, often darker or paler than its neighbour."""
    u, grey = cut.body.u, cut.stain.granule + 0.25 * (cut.body.u[3] - 0.5)
    cut.fill(grey + 0.03 * cut.canvas.fine[..., 0], 0.35)
    if u[4] < 0.3:  # a denser part
        cut.canvas.mix(grey - 0.3, ramp(-cut.s - 0.35 * cut.body.radii.mean(), -5, 5))
    cut.membrane(3, 5.0, 0.3 + 0.6 * u[5])


def _core(cut: Cut) -> None:
    """A dense core in a pale ring."""
    cut.fill(cut.stain.lumen, 0.3)
    thick = (0.2 + 0.3 * cut.body.u[3]) * cut.body.radii.mean()
    cut.canvas.mix(-1.0 + 0.4 * cut.body.u[4], ramp(-cut.s - thick, -4, 4))
    cut.membrane(3, 5.0)


def _peroxisome(cut: Cut) -> None:
    c = cut.canvas
    cut.fill(cut.stain.peroxisome + 0.03 * c.fine[..., 1], 0.5)
    if cut.body.u[3] < 0.35:  # a crystal
        stripes = np.cos(c.points @ cut.body.axis * 2 * np.pi / 21)
        core = ramp(-cut.s - 0.5 * cut.body.radii.mean(), -5, 5)
        c.mix(cut.stain.peroxisome - 0.35 + 0.12 * stripes, core)
    cut.membrane(4, 5.5)


def _lipid(cut: Cut) -> None:
    cut.fill(cut.stain.lipid, 0.1)
    cut.membrane(0, 6.0, 0.7 * cut.body.u[3])


def _vacuole(cut: Cut) -> None:
    cut.fill(cut.stain.lumen, 0.25)
    cut.membrane(4, cut.stain.membrane_nm)


def _multivesicular(cut: Cut) -> None:
    _vacuole(cut)
    p, fine = cut.canvas.points / 8.5, cut.canvas.fine
    blobs = np.cos(p[..., 1] + fine[..., 0]) * np.cos(p[..., 2] + fine[..., 1])
    blobs = np.abs(blobs * np.cos(p[..., 0] * 0.7))
    cut.canvas.mix(-0.7, ramp(blobs, 0.3, 0.7) * ramp(-cut.s, 14, 22))


def _nucleus(cut: Cut) -> None:
    """Two membranes with pores, clumps of heterochromatin, most along the envelope."""
    c, s, stain, u = cut.canvas, cut.s, cut.stain, cut.body.u
    cut.fill(stain.nucleoplasm, 1.2)
    clumps = 0.8 * c.middle[..., 1] + 0.7 * c.coarse[..., 6] + 1.6 * band(s + 70, 90)
    c.mix(stain.chromatin, ramp(clumps - 2.1 + 1.8 * u[3], 0, 0.35) * ramp(-s, 40, 52))
    if u[4] < 0.4:  # a nucleolus
        sponge = ramp(c.coarse[..., 5] + 0.35 * c.middle[..., 2], 1.1, 1.25)
        c.mix(stain.chromatin - 0.15, sponge * ramp(-s, 200, 230))
    closed = 1 - ramp(c.fine[..., 3], 1.3, 1.5)  # open at the pores
    c.mix(stain.gap, ramp(14 - np.abs(s + 18), -2, 3) * closed)
    cut.membrane(4, 6.0, 0.9 * closed)
    cut.membrane(32, 6.0, 0.9 * closed)


PAINTERS: dict[str, Callable[[Cut], None]] = {
    "mitochondrion": _mitochondrion,
    "lysosome": _lysosome,
    "granule": _granule,
    "core": _core,
    "peroxisome": _peroxisome,
    "lipid": _lipid,
    "vacuole": _vacuole,
    "multivesicular": _multivesicular,
    "nucleus": _nucleus,
}
LUMPY = {"lysosome": 0.16, "nucleus": 0.1, "mitochondrion": 0.07, "vacuole": 0.12}
"""How far surfaces stray from tubes and spheres, as a share of the radius."""
