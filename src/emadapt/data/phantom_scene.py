"""Synthetic tissue: everything that a phantom's microscope looks at, continuous and in nanometres.

A scene is warped Voronoi cells with mitochondria (double membrane, cristae), vesicles, and what is
as dark: dense and multivesicular bodies, synapses, sheaths of several membranes, reticulum, glia.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from emadapt.data.phantom_domains import DOMAINS, ORGANELLES, Domain

Array = np.ndarray
MARGIN_NM = 260.0  # the scene is larger than the volume, so that objects are cut by its faces
STEP_NM = 12.0
"""Between the spheres whose union is a tube: a scallop of 0.2 nm at a radius of 100 nm."""
RIM_NM = 16.0  # free space between a tube and the border of its cell
_CORNERS = np.array([c for c in np.ndindex(3, 3, 3) if c != (1, 1, 1)]) - 1.0
DIRECTIONS = _CORNERS / np.linalg.norm(_CORNERS, axis=1, keepdims=True)  # 26 all around
REACH_NM = 250.0  # distances to borders are known up to about this far


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
class Tube:
    """An organelle: a union of spheres along a bent line."""

    kind: str  # mitochondrion, dense, multivesicular, lipid
    centres: Array  # (N, 3) nm
    heading: Array  # (N, 3) unit vectors along the line
    radii: Array  # (N,) nm
    grey: float
    across: Array  # (3,) unit vector: the normal of lengthwise cristae
    lengthwise: bool

    def sdf(self, p: Array) -> tuple[Array, Array]:
        """(N, 3) points -> signed distance in nm, negative inside, and arc length in nm."""
        best, arc = np.full(len(p), np.inf), np.zeros(len(p))
        for i, (c, r) in enumerate(zip(self.centres, self.radii, strict=True)):
            d = np.sqrt((p[:, 0] - c[0]) ** 2 + (p[:, 1] - c[1]) ** 2 + (p[:, 2] - c[2]) ** 2) - r
            n = np.flatnonzero(d < best)
            best[n] = d[n]
            arc[n] = i * STEP_NM + (p[n] - c) @ self.heading[i]
        return best, arc


@dataclass(frozen=True)
class Scene:
    """Everything in one block of tissue, in nm; the volume to image starts at the origin."""

    domain: Domain
    extent: Array  # (3,) nm
    tree: cKDTree  # of the Voronoi seeds, in warped and stretched space
    cell: Array  # (N,) cell of each seed
    grey: Array  # (cells,)
    bouton: Array  # (cells,) bool: full of vesicles
    sheath: Array  # (cells,) bool: wrapped in several membranes
    warp: Waves
    wiggle: Waves
    mottle: Waves
    """Channels: cytosol, synapse, reticulum sheet, reticulum extent, cristae phase, cristae extent,
    glia."""
    tubes: list[Tube] = field(default_factory=list)
    vesicles: Array = field(default_factory=lambda: np.zeros((0, 5)))
    """(N, 5): z, y, x, radius, whether the core is dense."""

    def membrane(
        self, p: Array, reach: float = REACH_NM, warped: Array | None = None
    ) -> tuple[Array, Array]:
        """(N, 3) points and their warp, if known -> nm to the cell's border, index of the cell."""
        shift = self.warp(p) + self.wiggle(p) if warped is None else warped
        q = (p + shift) / (self.domain.stretch_z, 1.0, 1.0)
        d, i = self.tree.query(q, k=min(8, len(self.cell)))
        seeds, own = self.tree.data, self.cell[i[:, 0]]
        inverse = np.full(len(p), np.exp(-reach / 9.0))
        # Distance to each bisecting plane; a soft minimum rounds the corners of the cells.
        for j in range(1, i.shape[1]):
            n = np.flatnonzero((self.cell[i[:, j]] != own) & (d[:, j] - d[:, 0] < 2 * reach))
            gap = np.sqrt(((seeds[i[n, j]] - seeds[i[n, 0]]) ** 2).sum(axis=1))
            inverse[n] += np.exp((d[n, 0] ** 2 - d[n, j] ** 2) / (18.0 * gap))
        return np.maximum(-9.0 * np.log(inverse), 0.0), own

    def clearance(self, p: Array) -> Array:
        """(N, 3) points -> nm free around each: of its cell's border and of the organelles."""
        free = 0.8 * self.membrane(p)[0]  # warping stretches the distance
        if not self.tubes:
            return free
        centres = np.concatenate([t.centres for t in self.tubes]).T  # (3, S)
        radii = np.concatenate([t.radii for t in self.tubes])
        step = max(1, 500_000 // len(radii))  # points at a time, to bound the memory
        for i in range(0, len(p), step):
            z, y, x = p[i : i + step].T[..., None]  # (n, 1) each
            far = np.sqrt((z - centres[0]) ** 2 + (y - centres[1]) ** 2 + (x - centres[2]) ** 2)
            free[i : i + step] = np.minimum(free[i : i + step], (far - radii).min(axis=1))
        return free


def make_scene(domain: str, shape: tuple[int, int, int], seed: int) -> Scene:
    """Build the tissue for a volume of (z, y, x) voxels; the same arguments give the same scene."""
    d = (DOMAINS | ORGANELLES)[domain]
    rng = np.random.default_rng([seed, *domain.encode()])
    scene = _cells(d, np.array(shape) * d.voxel_nm, rng)
    _add_mitochondria(scene, rng)
    _add_bodies(scene, rng)
    return replace(scene, vesicles=_vesicles(scene, rng))


def _cells(d: Domain, extent: Array, rng: np.random.Generator) -> Scene:
    """The cells, without organelles."""
    low, high = np.full(3, -2.0 * MARGIN_NM), extent + 2.0 * MARGIN_NM
    volume = float(np.prod((high - low) / 1000.0))
    squeeze = np.array([d.stretch_z, 1.0, 1.0])
    n = max(16, int(volume * 1e9 / d.stretch_z / d.cell_nm**3))
    seeds = rng.uniform(low, high, size=(n, 3))
    cell = np.arange(n)
    for _ in range(int(np.ceil(volume * d.big_cells[0]))):
        axes = d.big_cells[1] * rng.uniform(0.6, 1.4, 3) * (d.stretch_z, 1, 1)
        inside = np.sum(((seeds - rng.uniform(low, high)) / axes) ** 2, axis=1) < 1
        if inside.any():
            cell[inside] = cell[inside][0]
    grey = d.cytosol + rng.normal(0, d.cytosol_sd, n)
    grey = grey - rng.uniform(35, 60, n) * (rng.random(n) < d.glia)
    return Scene(
        domain=d,
        extent=extent,
        tree=cKDTree(seeds / squeeze),
        cell=cell,
        grey=grey,
        bouton=rng.random(n) < 0.4,
        sheath=rng.random(n) < 0.035,
        warp=Waves.draw(rng, (420, 1000), 52.0, 3),
        wiggle=Waves.draw(rng, (110, 240), 6.0, 3),
        mottle=Waves.draw(rng, (150, 460), 1.0, 7, m=28),
    )


def _add_mitochondria(scene: Scene, rng: np.random.Generator) -> None:
    """Until they fill their share of the volume."""
    probes = rng.uniform(0, 1, size=(4000, 3)) * scene.extent
    covered = np.zeros(len(probes), bool)
    for _ in range(200):
        if covered.mean() >= scene.domain.foreground:
            break
        radius, length = rng.uniform(*scene.domain.radius_nm), rng.uniform(150, 1100)
        tube = _grow_tube(scene, rng, "mitochondrion", radius, length)
        if tube is not None:
            scene.tubes.append(tube)
            covered |= tube.sdf(probes)[0] < 0


def _add_bodies(scene: Scene, rng: np.random.Generator) -> None:
    """Dense and multivesicular bodies, and lipid droplets."""
    d, volume = scene.domain, float(np.prod((scene.extent + MARGIN_NM) / 1000.0))
    kinds = (
        ("dense", d.bodies, (40, 90), (0, 220)),
        ("multivesicular", 0.35 * d.bodies, (40, 90), (0, 220)),
        ("lipid", d.lipids, (50, 110), None),
    )
    for kind, density, radii, lengths in kinds:
        for _ in range(int(np.ceil(density * volume))):
            radius = rng.uniform(*radii)
            length = rng.uniform(*lengths) if lengths else 0.0
            tube = _grow_tube(scene, rng, kind, radius, length)
            if tube is not None:
                scene.tubes.append(tube)


def _vesicles(scene: Scene, rng: np.random.Generator) -> Array:
    """(N, 5) vesicles, mostly in boutons, clear of membranes, organelles and each other."""
    extent = scene.extent
    n = int(scene.domain.vesicles * 3 * np.prod((extent + 120) / 1000.0))
    p = rng.uniform(-60, extent + 60, size=(n, 3))
    core = rng.random(n) < 0.06
    radius = np.where(core, rng.uniform(30, 44, n), rng.uniform(16, 23, n))
    home = scene.bouton[scene.membrane(p)[1]] & (scene.mottle(p)[:, 3] > -0.3)
    keep = (scene.clearance(p) > radius + 8) & (home | (rng.random(n) < 0.06))
    found = np.column_stack([p, radius, core])[keep]
    near = cKDTree(found[:, :3]).query_pairs(38.0) if len(found) else set()
    drop = {max(pair) for pair in near}
    return np.array([v for i, v in enumerate(found) if i not in drop]).reshape(-1, 5)


def _grow_tube(
    scene: Scene, rng: np.random.Generator, kind: str, radius: float, length: float
) -> Tube | None:
    """Grow a bent tube of about this radius and length (nm) where a cell has room, or give up."""
    low, high = -0.6 * MARGIN_NM, scene.extent + 0.6 * MARGIN_NM
    candidates = rng.uniform(low, high, size=(48, 3))
    room = scene.clearance(candidates)
    best = int(np.argmax(np.minimum(room, radius + 25) + rng.uniform(0, 8, len(room))))
    if room[best] < 0.75 * radius + RIM_NM:
        return None
    start = candidates[best]
    heading = rng.normal(size=3)
    heading /= np.linalg.norm(heading)
    steps = int(length / 2 / STEP_NM)
    ahead, behind = (_walk(scene, rng, start, s * heading, steps, radius) for s in (1.0, -1.0))
    centres = np.array([*behind[::-1], start, *ahead])
    radii = _fit_radii(scene, rng, centres, radius, home=scene.membrane(start[None])[1])
    if radii is None:
        return None
    tangents = np.gradient(centres, axis=0) if len(centres) > 1 else heading[None]
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    # Lamellae that a slice cuts edge-on are the ones one sees.
    across = np.cross(heading, rng.normal(size=3)) * (0.4, 1, 1)
    d = scene.domain
    grey = {
        "mitochondrion": d.matrix,
        "dense": d.matrix - 14,
        "multivesicular": d.cytosol - 35,
        "lipid": d.lipid,
    }[kind]
    grey += rng.normal(0, d.matrix_sd)
    across = across / np.linalg.norm(across)
    return Tube(kind, centres, tangents, radii, grey, across, bool(rng.random() < 0.55))


def _walk(
    scene: Scene, rng: np.random.Generator, p: Array, heading: Array, steps: int, radius: float
) -> list[Array]:
    """Points from p onwards: looks ahead, bends away from the walls, stops where it is narrow."""
    points = []
    for _ in range(steps):
        turns = heading + rng.normal(scale=0.28, size=(5, 3))
        turns /= np.linalg.norm(turns, axis=1, keepdims=True)
        ahead = scene.clearance(p + turns * 3 * STEP_NM)
        best = int(np.argmax(ahead))
        if ahead[best] < 0.6 * radius + RIM_NM:
            break
        heading = 0.7 * heading + 0.3 * turns[best]
        heading /= np.linalg.norm(heading)
        p = p + heading * STEP_NM
        points.append(p)
    return points


def _fit_radii(
    scene: Scene, rng: np.random.Generator, centres: Array, radius: float, home: Array
) -> Array | None:
    """Radii along a line that keep the tube within its cell, or None where it gets too thin."""
    along = np.linspace(0, rng.uniform(2, 7), len(centres))
    wanted = radius * (1 + 0.12 * np.sin(along + rng.uniform(0, 6)))
    radii = np.minimum(wanted, scene.clearance(centres) - RIM_NM)
    for _ in range(6):
        slim = ndimage.minimum_filter1d(radii, 5, mode="nearest")
        radii = np.minimum(ndimage.gaussian_filter1d(slim, 3.0, mode="nearest"), radii)
        if radii.min() < 0.5 * radius:
            return None
        skin = centres[:, None] + DIRECTIONS * (radii[:, None, None] + 6.0)  # (N, 26, 3)
        border, cell = scene.membrane(skin.reshape(-1, 3), reach=30.0)
        tight = ((border < 8.0) | (cell != home)).reshape(skin.shape[:2]).any(axis=1)
        if not tight.any():
            return radii
        radii[tight] *= 0.88
    return None
