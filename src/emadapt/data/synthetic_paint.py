"""Sections of synthetic tissue: grey in units of contrast, labels, and how grainy each place is."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from emadapt.data.synthetic_organelles import Canvas, band, draw_body, ramp
from emadapt.data.synthetic_tissue import Array, Block, Waves


def paint(block: Block, z: float, y: Array, x: Array) -> Canvas:
    """The section at z, rows y and columns x (nm)."""
    shape = len(y), len(x)
    points = np.stack(np.broadcast_arrays(z, *np.meshgrid(y, x, indexing="ij")), axis=-1)

    def field(waves: Waves) -> Array:
        return waves.plane(z, y, x).reshape(*shape, -1)

    every = 3 if block.tissue.cell_nm > 1500 else 1  # borders of large cells are smooth
    shift = field(block.warp) + field(block.wiggle)
    some = np.s_[::every, ::every]
    border, cell = block.border(points[some].reshape(-1, 3), shift[some].reshape(-1, 3))
    border, cell = (a.reshape(shift[some].shape[:2]) for a in (border, cell))
    if every > 1:
        at = np.mgrid[: shape[0], : shape[1]] / every
        border = ndimage.map_coordinates(border, at, order=1, mode="nearest")
        cell = cell[tuple((at + 0.5).astype(int).clip(0, np.array(cell.shape)[:, None, None] - 1))]
    fine, middle, coarse = field(block.fine), field(block.middle), field(block.coarse)
    image = block.shade[cell] + 0.05 * middle[..., 0]
    grain = 0.5 + 0.5 * ramp(middle[..., 1], -1.2, 1.0)
    label, near = np.zeros(shape, bool), np.full(shape, 1e4)
    canvas = Canvas(points, border, cell, fine, middle, coarse, image, grain, label, near)
    _vesicles(block, canvas, z)
    if block.tissue.fibrils:
        _fibrils(block, canvas)
    for body in block.bodies:
        draw_body(block, body, canvas, z)
    _reticulum(block, canvas)
    _space(block, canvas)
    _membranes(block, canvas)
    return canvas


def _membranes(block: Block, c: Canvas) -> None:
    tissue, width = block.tissue, block.stain.membrane_nm
    inside = block.kinds[c.cell] != 2
    c.mix(block.stain.space, ramp(tissue.cleft_nm - c.border, -2, 3) * (tissue.cleft_nm > 12))
    wall = band(c.border - tissue.cleft_nm, width) * np.where(inside, 1.0, 0.3)
    if block.sheathed.any():
        thick = 40 + 160 * np.abs(np.sin(7.0 * block.shade[c.cell]))
        sheath = block.sheathed[c.cell] & (c.border < thick + 12 * c.middle[..., 2])
        layers = 0.72 + 0.28 * np.cos(c.border * 2 * np.pi / 16.0 + 0.6 * c.fine[..., 0])
        wall = np.maximum(wall, sheath * layers)
    synapse = band(c.border, 28.0) * ramp(c.coarse[..., 1] + c.middle[..., 2], 1.6, 2.0)
    c.mix(-1.0, np.clip(wall + 0.8 * synapse * inside, 0, 1))
    c.calm(0.25, np.clip(wall, 0, 1))


def _vesicles(block: Block, c: Canvas, z: float) -> None:
    for *centre, radius in block.vesicles[np.abs(block.vesicles[:, 0] - z) < 60]:
        part = c.part(np.array(centre[1:]), np.array(centre[1:]), radius + 12)
        r = np.sqrt(((part.points - centre) ** 2).sum(axis=-1))
        part.mix(block.stain.reticulum, ramp(radius - r, -2, 2))
        part.mix(-0.85, band(r - radius, 6.0))


def _fibrils(block: Block, c: Canvas) -> None:
    """Muscle: fibrils with bands along them, apart from each other by cytosol."""
    axis = block.axis
    across = np.cross(axis, (1.0, 0.0, 0.0))
    across /= np.linalg.norm(across)
    t = c.points @ across + 130 * c.coarse[..., 2]
    s = c.points @ axis + 60 * c.coarse[..., 3]
    fibril = ramp(np.abs(np.mod(t / 1100, 1) - 0.5), 0.06, 0.09) * ramp(c.border, 60, 90)
    phase = np.mod(s / 2100, 1) - 0.5
    bands = -0.35 * ramp(np.abs(phase), 0.26, 0.22) - 0.9 * band(np.abs(phase) - 0.5, 0.025)
    texture = 0.22 * np.cos(t * 2 * np.pi / 36 + 2 * c.fine[..., 1])
    c.mix(bands + texture + 0.05, fibril * (block.kinds[c.cell] != 2))


def _reticulum(block: Block, c: Canvas) -> None:
    """Single sheets and tubes, stacks of ER and of Golgi, and ER along organelles."""
    tissue, stain = block.tissue, block.stain
    free = ramp(c.border, 25, 40) * ramp(c.near, 12, 22) * (block.kinds[c.cell] != 2)

    def above(values: Array, share: float) -> Array:
        """Places where a field of standard deviation 1 is in its upper share."""
        return ramp(values, cut := np.quantile(values, 1 - min(share, 0.98)), cut + 0.25)

    def sheet(distance: Array, half: float, where: Array) -> None:
        """Two membranes and the lumen between them."""
        c.mix(stain.reticulum, ramp(half - np.abs(distance), -2, 3) * where)
        c.mix(-0.85, band(np.abs(distance) - half, 5.5) * where)

    if tissue.glycogen:
        c.grain += tissue.glycogen * above(c.middle[..., 6], 0.4) * free
    if tissue.reticulum:
        where = above(c.middle[..., 3] + 0.5 * c.coarse[..., 4], tissue.reticulum) * free
        sheet(c.middle[..., 5] * 55.0, 13.0, where)
    if tissue.hugging:
        where = above(c.middle[..., 4], tissue.hugging) * ramp(c.border, 25, 40)
        for k in (0, 1):
            shell = where * (c.near > 14) * (block.kinds[c.cell] != 2) * (c.near < 200)
            sheet(c.near - 45 - 85 * k - 8 * c.fine[..., 2], 13.0, shell)
    for share, period, half, channel in (
        (tissue.stacks, 95.0, 15.0, 5),
        (tissue.golgi, 44.0, 9.0, 6),
    ):
        if share:
            where = above(c.coarse[..., channel], share) * free
            normal = np.array([0.2, np.cos(period), np.sin(period)])
            t = c.points @ normal + 210 * c.coarse[..., 0] + 14 * c.middle[..., 3]
            where = where * ramp(c.middle[..., 2], -1.3, -1.0)
            sheet((np.mod(t / period, 1) - 0.5) * period, half, where)


def _space(block: Block, c: Canvas) -> None:
    """What is between cells, over everything else."""
    space = (block.kinds[c.cell] == 2) * 1.0
    if not space.any():
        return
    filling, stain = block.tissue.filling, block.stain
    c.mix(stain.space + 0.04 * c.coarse[..., 3], space)
    c.calm(0.15 if filling == "resin" else 0.5, space)
    if filling == "microvilli":
        pitch = 150.0
        q = c.points + 60 * c.coarse[..., :3] + 42 * c.middle[..., :3]
        u, v = q[..., 1] / pitch, (q[..., 2] + 0.4 * q[..., 0]) / (pitch * 1.6)
        u = u + 0.5 * (np.floor(v) % 2)
        du, dv = (np.mod(u, 1) - 0.5) * pitch, (np.mod(v, 1) - 0.5) * pitch * 1.6
        d = np.hypot(du, dv / (1 + 0.5 * np.tanh(c.coarse[..., 4]))) - 48
        crowd = space * ramp(c.coarse[..., 5], -0.9, -0.6)
        c.mix(-0.1, ramp(-d, -2, 2) * crowd)
        c.mix(-1.0, band(d, block.stain.membrane_nm) * crowd)
    elif filling == "collagen":
        q = c.points[..., 1] + 30 * c.coarse[..., 2], c.points[..., 2] + 30 * c.coarse[..., 3]
        dots = np.cos(2 * np.pi * q[0] / 62 + c.fine[..., 0]) * np.cos(2 * np.pi * q[1] / 70)
        c.mix(-0.55, ramp(dots, 0.1, 0.5) * space * ramp(c.coarse[..., 5], -0.4, 0.0))
    elif filling == "erythrocyte":
        c.mix(-0.75, space * ramp(c.border, 10, 20))
