"""Synthetic tissue of any kind: cells and organelles of a block, continuous and in nanometres."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from emadapt.data.synthetic_recipes import Kind, Rng, Stain, Tissue

Array = np.ndarray
RIM_NM = 14.0
"""Free space around an organelle."""


@dataclass(frozen=True)
class Waves:
    """A smooth random field of space: a sum of plane waves, defined everywhere."""

    k: Array  # (M, 3) rad/nm
    phase: Array  # (M,)
    amplitude: Array  # (M, C)

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        wavelength: tuple[float, float],
        sd: float,
        channels: int,
        m: int = 14,
    ) -> Waves:
        """`m` waves of random direction, wavelengths uniform in nm, and standard deviation `sd`."""
        direction = rng.normal(size=(m, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        amplitude = rng.normal(size=(m, channels))
        amplitude *= sd * np.sqrt(2) / np.linalg.norm(amplitude, axis=0)
        frequency = 2 * np.pi / rng.uniform(*wavelength, m)
        return cls(direction * frequency[:, None], rng.uniform(0, 2 * np.pi, m), amplitude)

    def __call__(self, p: Array) -> Array:
        """(N, 3) points in nm -> (N, C)."""
        z, y, x = np.ascontiguousarray(p.T)
        out = np.zeros((self.amplitude.shape[1], len(p)))  # channel by channel: twice as fast
        for k, phase, amplitude in zip(self.k, self.phase, self.amplitude, strict=True):
            c = np.cos(z * k[0] + y * k[1] + x * k[2] + phase)
            for channel, a in enumerate(amplitude):
                out[channel] += a * c
        return out.T

    def plane(self, z: float, y: Array, x: Array) -> Array:
        """The same on the grid of rows y and columns x at one z -> (Y * X, C), 10 times as fast.

        By `einsum`: the rounding of a matrix product may depend on the number of threads.
        """
        a = z * self.k[:, 0] + y[:, None] * self.k[:, 1] + self.phase  # (Y, M)
        b = x[:, None] * self.k[:, 2]  # (X, M)
        rows = np.concatenate([np.cos(a), -np.sin(a)], axis=1)
        columns = np.concatenate([np.cos(b), np.sin(b)], axis=1)
        weighted = rows * np.concatenate([self.amplitude, self.amplitude]).T[:, None]  # (C, Y, 2M)
        out = np.empty((len(weighted), len(y), len(x)))
        for channel, w in enumerate(weighted):
            np.einsum("ym,mx->yx", w, columns.T.copy(), out=out[channel])
        return out.reshape(len(out), -1).T


@dataclass(frozen=True)
class Body:
    """An organelle: a union of tapered capsules along a bent, perhaps branched, line."""

    kind: str
    starts: Array  # (N, 3) nm
    ends: Array  # (N, 3) nm
    radii: Array  # (N, 2) nm, at both ends
    axis: Array  # (3,) unit vector: the normal of lamellae
    u: Array  # (8,) uniform in [0, 1]: what distinguishes it from others of its kind

    @property
    def reach(self) -> float:
        return float(self.radii.max()) * 1.25 + 40.0

    def sdf(self, p: Array) -> tuple[Array, Array]:
        """Points (..., 3) -> distance from the surface in nm, negative inside, and nm along it."""
        best, along, passed = np.full(p.shape[:-1], np.inf), np.zeros(p.shape[:-1]), 0.0
        for a, b, (ra, rb) in zip(self.starts, self.ends, self.radii, strict=True):
            ab = b - a
            length = max(float(np.sqrt(ab @ ab)), 1e-6)
            t = (p - a) @ (ab / length)
            h = np.clip(t / length, 0, 1)
            off = p - a - h[..., None] * ab
            d = np.sqrt(np.einsum("...i,...i->...", off, off)) - (ra + (rb - ra) * h)
            along = np.where(d < best, passed + t, along)
            best = np.minimum(best, d)
            passed += length
        return best, along


@dataclass(frozen=True)
class Block:
    """A block of tissue, whose sections are to be painted; it starts at the origin.

    Attributes:
        seeds: of Voronoi cells, in warped and stretched space; `cell` is the cell of each.
        kinds: per cell: 0 a cell, 1 a dark one, 2 the space between cells.
        sheathed: per cell, whether it is wrapped in myelin.
        shade: per cell, of its cytosol.
        squeeze: (3, 3), to the space of the seeds.
        fine, middle, coarse: random fields.
    """

    tissue: Tissue
    stain: Stain
    extent: Array
    seeds: cKDTree
    cell: Array
    kinds: Array
    sheathed: Array
    shade: Array
    squeeze: Array
    axis: Array  # (3,) along which cells, fibrils and mitochondria run
    warp: Waves
    wiggle: Waves
    fine: Waves
    middle: Waves
    coarse: Waves
    bodies: list[Body] = field(default_factory=list)
    vesicles: Array = field(default_factory=lambda: np.zeros((0, 4)))

    def border(self, p: Array, shift: Array) -> tuple[Array, Array]:
        """(N, 3) points and their warp -> nm to the border of the cell, number of the cell."""
        d, i = self.seeds.query((p + shift) @ self.squeeze, k=min(5, self.seeds.n))
        own, seeds = self.cell[i[:, 0]], self.seeds.data
        soft = np.clip(0.03 * self.tissue.cell_nm, 8.0, 60.0)
        inverse = np.full(len(p), np.exp(-600.0 / soft))
        for j in range(1, i.shape[1]):
            n = np.flatnonzero(self.cell[i[:, j]] != own)
            gap = np.sqrt(((seeds[i[n, j]] - seeds[i[n, 0]]) ** 2).sum(axis=1))
            inverse[n] += np.exp(-(d[n, j] ** 2 - d[n, 0] ** 2) / (2 * soft * gap))
        return np.maximum(-soft * np.log(inverse), 0.0), own

    def room(self, p: Array) -> tuple[Array, Array]:
        """(N, 3) points -> nm free around each, and its cell; none in the space between cells."""
        border, cell = self.border(p, self.warp(p) + self.wiggle(p))
        free = np.where(self.kinds[cell] == 2, -1.0, 0.85 * border - self.tissue.cleft_nm)
        if self.bodies:
            centres = np.concatenate([e for body in self.bodies for e in (body.starts, body.ends)])
            radii = np.concatenate([body.radii.T.ravel() for body in self.bodies])
            free = np.minimum(free, (cdist(p, centres) - radii).min(axis=1))
        return free, cell


def make_block(tissue: Tissue, stain: Stain, extent: Array, rng: Rng) -> Block:
    """Build cells and organelles for a block of `extent` (z, y, x) nm."""
    nucleated = rng.random() < tissue.nucleus
    block = _cells(tissue, stain, extent, nucleated, rng)
    if nucleated:
        _add(block, "nucleus", Kind(0, (1000, 2400), (0, 900)), rng)
    area = float(extent[1] * extent[2]) / 1e6
    for kind, body in tissue.bodies.items():
        wanted = rng.poisson(body.per_um2 * area)
        if kind == "mitochondrion":
            wanted = max(2, wanted)
        wanted += len(block.bodies)
        for _ in range(3 * wanted):
            if len(block.bodies) < wanted:
                _add(block, kind, body, rng)
    return replace(block, vesicles=_vesicles(block, area, rng))


def _cells(tissue: Tissue, stain: Stain, extent: Array, nucleated: bool, rng: Rng) -> Block:
    size = tissue.cell_nm
    margin = np.minimum(1.6 * size * tissue.stretch, 9000)
    low, high = np.full(3, -margin), extent + margin
    n = int(np.clip(np.prod((high - low) / size) / tissue.stretch, 12, 20_000))
    seeds, cell = rng.uniform(low, high, (n, 3)), np.arange(n)
    for _ in range(int(tissue.merged * n / 6)):
        reach = size * rng.uniform(0.7, 1.7)
        inside = ((seeds - rng.uniform(low, high)) ** 2).sum(axis=1) < reach**2
        if inside.any():
            cell[inside] = cell[inside][0]
    if nucleated:  # a cell that has room for a nucleus
        centre = extent * rng.uniform(-0.3, 1.3, 3)
        cell[((seeds - centre) ** 2).sum(axis=1) < 3200**2] = n - 1
    axis = rng.normal(size=3) * (rng.uniform(0.2, 1.5), 1, 1)
    axis /= np.linalg.norm(axis)
    squeeze = np.eye(3) + (1 / tissue.stretch - 1) * np.outer(axis, axis)
    kinds = np.where(rng.random(n) < tissue.dark, 1, 0)
    kinds[rng.random(n) < tissue.lumen] = 2
    if nucleated:
        kinds[-1] = 0
    return Block(
        tissue,
        stain,
        extent,
        cKDTree(seeds @ squeeze),
        cell,
        kinds,
        (rng.random(n) < tissue.sheath) & (kinds != 2),
        rng.normal(0, 0.08, n) - 0.35 * (kinds == 1),
        squeeze,
        axis,
        Waves.draw(rng, (1.3 * size, 3.5 * size), 0.16 * size, 3),
        Waves.draw(rng, (180, 520), float(np.clip(0.03 * size, 5, 22)), 3),
        Waves.draw(rng, (60, 190), 1.0, 5, m=40),
        Waves.draw(rng, (220, 700), 1.0, 7, m=32),
        Waves.draw(rng, (900, 2800), 1.0, 7, m=20),
    )


def _add(block: Block, kind: str, spec: Kind, rng: Rng) -> None:
    """Grow one organelle where there is room, or give up."""
    u = rng.random(8)
    radius = spec.radius[0] + (spec.radius[1] - spec.radius[0]) * u[0] ** 1.2
    length = rng.uniform(*spec.length)
    margin = np.array([0.7, 0.8, 0.8]) * min(radius, 1500)
    p = rng.uniform(-margin, block.extent + margin, (64, 3))
    free, cells = block.room(p)
    best = int(np.argmax(np.minimum(free, radius + RIM_NM) + rng.uniform(0, 30, len(p))))
    radius = min(radius, max(free[best] - RIM_NM, 0.8 * spec.radius[0]))
    if free[best] < radius + 0.6 * RIM_NM:
        return
    heading = rng.normal(size=3)
    if block.tissue.fibrils or (block.tissue.stretch > 1.3 and rng.random() < 0.7):
        heading = block.axis * rng.choice([-1, 1]) + 0.15 * heading
    heading /= np.linalg.norm(heading)
    chains = [
        _walk(block, p[best], cells[best], sign * heading, length / 2, radius, rng)
        for sign in (1.0, -1.0)
    ]
    line = np.array([*chains[1][::-1], p[best], *chains[0]])
    if kind == "mitochondrion" and length > 700 and rng.random() < 0.35:
        side = np.cross(heading, rng.normal(size=3))
        side /= np.linalg.norm(side)
        branch = [p[best], *_walk(block, p[best], cells[best], side, length / 3, radius, rng)]
    else:
        branch = []
    lines = [line, np.array(branch)] if len(branch) > 1 else [line]
    starts, ends = (
        np.concatenate([some[part] if len(some) > 1 else some for some in lines])
        for part in (np.s_[:-1], np.s_[1:])
    )
    radii = []
    for some in lines:
        beads = 1 + 0.18 * u[1] * np.sin(np.arange(len(some)) * rng.uniform(0.4, 1.2) + 6 * u[2])
        own = np.minimum(radius * beads, block.room(some)[0] - RIM_NM)
        own = np.maximum(own, 0.6 * radius)
        radii.append(np.stack([own[:-1], own[1:]], 1) if len(own) > 1 else own.repeat(2)[None])
    axis = np.cross(heading, rng.normal(size=3)) if rng.random() < 0.5 else heading.copy()
    axis += rng.normal(0, 0.15, 3)
    body = Body(kind, starts, ends, np.concatenate(radii), axis / np.linalg.norm(axis), u)
    block.bodies.append(body)


def _walk(
    block: Block, p: Array, cell: int, heading: Array, length: float, radius: float, rng: Rng
) -> list[Array]:
    """Points from p onwards, without it: bends away from what is in the way, stops if stuck."""
    points, step = [], max(0.7 * radius, 50.0)
    for _ in range(int(length / step)):
        turns = heading + rng.normal(scale=0.3, size=(6, 3))
        turns /= np.linalg.norm(turns, axis=1, keepdims=True)
        free, cells = block.room(p + turns * step)
        free[cells != cell] = -1
        best = int(np.argmax(np.minimum(free, 1.3 * radius + RIM_NM)))
        if free[best] < 0.6 * radius + RIM_NM:
            break
        heading = turns[best]
        p = p + heading * step
        points.append(p)
    return points


def _vesicles(block: Block, area: float, rng: Rng) -> Array:
    """(N, 4) centres and radii of vesicles, mostly in crowds."""
    n = rng.poisson(block.tissue.vesicles * area * (1 + block.extent[0] / 50))
    p = rng.uniform(-40, block.extent + 40, (min(n, 6000), 3))
    if not len(p):
        return np.zeros((0, 4))
    free, cells = block.room(p)
    bouton = np.sin(91 * block.shade[cells]) + 0.5 * block.middle(p)[:, 4]
    crowd = bouton if block.tissue.cell_nm < 1500 else block.coarse(p)[:, 4]
    home = (crowd > 0.6) | (rng.random(len(p)) < 0.05)
    radius = rng.uniform(16, 30, len(p)) * rng.choice([1, 1, 1, 1.6], len(p))
    return np.column_stack([p, radius])[home & (free > radius + 6)]
