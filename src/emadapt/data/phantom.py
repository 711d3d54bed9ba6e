"""Synthetic electron microscopy: two domains that differ as FIB-SEM and serial-section TEM do.

A scene is continuous, in nanometres: warped Voronoi cells, and in the cells mitochondria (double membrane, cristae; the
label), vesicles, and what is mistaken for mitochondria when only darkness counts: dense bodies, multivesicular bodies,
dense-core vesicles, synaptic densities, sheaths of several membranes, strips of endoplasmic reticulum, dark glia. It is
then imaged with the voxels, blur, noise and section defects of a domain, so that neighbouring slices are near copies at
5 nm and change a lot at 50 nm.

The grey levels, noise and sizes follow statistics measured on the EPFL hippocampus (Lucchi et al. 2012) and on the
Drosophila ventral nerve cord (Gerhard et al. 2013). No pixel of either is in here.

`python -m emadapt.data.phantom OUT` writes both domains under OUT.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage
from scipy.spatial import cKDTree

Array = np.ndarray
MARGIN_NM = 260.0  # the scene is larger than the volume, so that objects are cut by its faces
STEP_NM = 12.0  # between the spheres whose union is a tube: a scallop of 0.2 nm at a radius of 100 nm


@dataclass(frozen=True)
class Domain:
    """How one kind of microscope and tissue looks. Grey levels are 0-255, lengths in nm unless they say px (in-plane pixels)."""

    voxel_nm: tuple[float, float, float]  # z, y, x
    slab_nm: tuple[float, ...]  # planes averaged in a slice: a thick section is seen in projection
    cell_nm: float  # mean distance of the Voronoi seeds
    stretch_z: float  # neurites that run along z
    big_cells: tuple[float, float]  # number per cubic micron, radius: these swallow the seeds inside them
    cytosol: float
    cytosol_sd: float  # between cells
    glia: float  # share of the cells that are dark
    membrane: float
    membrane_nm: float  # half width
    cleft_nm: float  # half the distance of the two membranes of neighbours
    matrix: float  # inside a mitochondrion
    matrix_sd: float
    crista: float  # grey of the lamellae
    radius_nm: tuple[float, float]  # of mitochondria
    foreground: float  # share of the volume aimed at
    vesicle: float
    vesicles: float  # per cubic micron
    bodies: float  # dense bodies per cubic micron
    grain: float  # sd of the texture of cytoplasm and organelles
    grain_nm: float
    cloud: float  # sd of the coarser texture of the cytosol
    cloud_nm: float
    blur_px: float  # point spread in the plane
    blur_z: float  # in slices
    shading: float  # sd of the uneven background
    noise: float  # sd of the detector's noise
    noise_px: float  # its correlation length
    jitter_px: float  # sd of the residual shift of a section
    gain_sd: float  # contrast, between slices
    offset_sd: float  # brightness, between slices
    defects: float  # share of the sections with a fold or knife mark


DOMAINS: dict[str, Domain] = {
    "phantom_fib": Domain(
        voxel_nm=(5.0, 5.0, 5.0), slab_nm=(0.0,), cell_nm=285.0, stretch_z=1.0, big_cells=(5.0, 400.0),
        cytosol=167.0, cytosol_sd=9.0, glia=0.08, membrane=56.0, membrane_nm=7.5, cleft_nm=9.0,
        matrix=104.0, matrix_sd=8.0, crista=62.0, radius_nm=(80.0, 165.0), foreground=0.072,
        vesicle=88.0, vesicles=7000.0, bodies=22.0, grain=9.0, grain_nm=7.0, cloud=15.0, cloud_nm=15.0, blur_px=1.35, blur_z=0.6,
        shading=9.0, noise=13.0, noise_px=0.0, jitter_px=0.15, gain_sd=0.02, offset_sd=3.0, defects=0.0,
    ),
    "phantom_tem": Domain(
        voxel_nm=(50.0, 4.6, 4.6), slab_nm=(-10.0, 0.0, 10.0), cell_nm=225.0, stretch_z=1.7, big_cells=(6, 330.0),
        cytosol=172.0, cytosol_sd=7.0, glia=0.08, membrane=36.0, membrane_nm=7.5, cleft_nm=0.0,
        matrix=82.0, matrix_sd=10.0, crista=172.0, radius_nm=(85.0, 150.0), foreground=0.062,
        vesicle=95.0, vesicles=220.0, bodies=13.0, grain=26.0, grain_nm=6.0, cloud=12.0, cloud_nm=13.0, blur_px=0.5, blur_z=0.0,
        shading=5.0, noise=18.0, noise_px=0.62, jitter_px=1.2, gain_sd=0.015, offset_sd=1.0, defects=0.2,
    ),
}  # fmt: skip

SHAPES: dict[str, dict[str, tuple[int, int, int]]] = {
    "phantom_fib": {"train": (32, 320, 320), "test": (16, 320, 320)},
    "phantom_tem": {"train": (16, 320, 320), "test": (6, 320, 320)},
}


@dataclass(frozen=True)
class Waves:
    """A smooth random field of space: a sum of plane waves, defined everywhere, so no grid limits a slice."""

    k: Array  # (M, 3) rad/nm
    phase: Array  # (M,)
    amplitude: Array  # (M, C)

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength: tuple[float, float], sd: float, channels: int, m: int = 14) -> "Waves":
        """Waves of random direction, wavelengths in nm uniform in the range; each channel has the given standard deviation."""
        direction = rng.normal(size=(m, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        amplitude = rng.normal(size=(m, channels))
        amplitude *= sd * np.sqrt(2) / np.linalg.norm(amplitude, axis=0)
        return cls(direction * (2 * np.pi / rng.uniform(*wavelength, m))[:, None], rng.uniform(0, 2 * np.pi, m), amplitude)

    def __call__(self, p: Array) -> Array:
        """(N, 3) points in nm -> (N, C)."""
        z, y, x = np.ascontiguousarray(p.T)
        out = np.zeros((self.amplitude.shape[1], len(p)))  # one channel after the other: twice as fast
        for k, phase, amplitude in zip(self.k, self.phase, self.amplitude, strict=True):
            c = np.cos(z * k[0] + y * k[1] + x * k[2] + phase)
            for channel, a in enumerate(amplitude):
                out[channel] += a * c
        return out.T

    def plane(self, z: float, y: Array, x: Array) -> Array:
        """The same on the grid of rows y and columns x at one z, 10 times as fast, as cos(a + b) separates -> (Y * X, C).

        `einsum` and not a matrix product, whose rounding may depend on the number of threads.
        """
        a = z * self.k[:, 0] + y[:, None] * self.k[:, 1] + self.phase  # (Y, M)
        b = x[:, None] * self.k[:, 2]  # (X, M)
        rows, columns = np.concatenate([np.cos(a), -np.sin(a)], axis=1), np.concatenate([np.cos(b), np.sin(b)], axis=1)
        weighted = rows * np.concatenate([self.amplitude, self.amplitude]).T[:, None]  # (C, Y, 2M)
        out = np.empty((len(weighted), len(y), len(x)))
        for channel, w in enumerate(weighted):
            np.einsum("ym,mx->yx", w, columns.T.copy(), out=out[channel])
        return out.reshape(len(out), -1).T


@dataclass(frozen=True)
class Tube:
    """A union of spheres along a bent line: an organelle."""

    kind: str  # mitochondrion, dense, multivesicular
    centres: Array  # (N, 3) nm
    heading: Array  # (N, 3) unit vectors along the line
    radii: Array  # (N,) nm
    grey: float
    across: Array  # (3,) unit vector: the normal of lengthwise cristae
    lengthwise: bool

    def sdf(self, p: Array) -> tuple[Array, Array]:
        """(N, 3) points -> signed distance in nm, negative inside, and the arc length in nm of the nearest sphere."""
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
    mottle: Waves  # channels: cytosol, synapse, reticulum sheet, reticulum extent, cristae phase, cristae extent, glia
    tubes: list[Tube] = field(default_factory=list)
    vesicles: Array = field(default_factory=lambda: np.zeros((0, 5)))  # z, y, x, radius, dense core 0/1

    def membrane(self, p: Array, reach: float = 250.0, warped: Array | None = None) -> tuple[Array, Array]:
        """(N, 3) points in nm -> (distance to the next cell's border in nm, at most about `reach`; index of the cell)."""
        q = (p + (self.warp(p) + self.wiggle(p) if warped is None else warped)) / (self.domain.stretch_z, 1.0, 1.0)
        d, i = self.tree.query(q, k=min(8, len(self.cell)))
        seeds, own = self.tree.data, self.cell[i[:, 0]]
        inverse = np.full(len(p), np.exp(-reach / 9.0))
        for j in range(1, i.shape[1]):  # distance to each bisecting plane; a soft minimum rounds the corners of the cells
            n = np.flatnonzero((self.cell[i[:, j]] != own) & (d[:, j] - d[:, 0] < 2 * reach))
            gap = np.sqrt(((seeds[i[n, j]] - seeds[i[n, 0]]) ** 2).sum(axis=1))
            inverse[n] += np.exp((d[n, 0] ** 2 - d[n, j] ** 2) / (18.0 * gap))
        return np.maximum(-9.0 * np.log(inverse), 0.0), own

    def clearance(self, p: Array) -> Array:
        """(N, 3) points -> nm that are free around each: of the cell's border (warping stretches it) and of the organelles."""
        free = 0.8 * self.membrane(p)[0]
        if not self.tubes:
            return free
        centres = np.concatenate([t.centres for t in self.tubes]).T  # (3, S)
        radii = np.concatenate([t.radii for t in self.tubes])
        step = max(1, 500_000 // len(radii))  # points at a time, to bound the memory
        for i in range(0, len(p), step):
            q = p[i : i + step, :, None]  # (n, 3, 1)
            far = np.sqrt((q[:, 0] - centres[0]) ** 2 + (q[:, 1] - centres[1]) ** 2 + (q[:, 2] - centres[2]) ** 2)
            free[i : i + step] = np.minimum(free[i : i + step], (far - radii).min(axis=1))
        return free


def _grow_tube(scene: Scene, rng: np.random.Generator, kind: str, radius: float, length: float) -> Tube | None:
    """Grow a bent tube of about this radius (nm) where a cell has room for it, or give up."""
    low, high = -0.6 * MARGIN_NM, scene.extent + 0.6 * MARGIN_NM
    candidates = rng.uniform(low, high, size=(48, 3))
    room = scene.clearance(candidates)
    start = int(np.argmax(np.minimum(room, radius + 25) + rng.uniform(0, 8, len(room))))
    rim = 16.0
    if room[start] < 0.75 * radius + rim:
        return None
    heading = rng.normal(size=3)
    heading /= np.linalg.norm(heading)
    sides: list[list[Array]] = []
    for sign in (1.0, -1.0):
        p, h, side = candidates[start], sign * heading, []
        for _ in range(int(length / 2 / STEP_NM)):
            turns = h + rng.normal(scale=0.28, size=(5, 3))
            turns /= np.linalg.norm(turns, axis=1, keepdims=True)
            ahead = scene.clearance(p + turns * 3 * STEP_NM)  # look ahead and bend away from the walls
            best = int(np.argmax(ahead))
            if ahead[best] < 0.6 * radius + rim:
                break
            h = 0.7 * h + 0.3 * turns[best]
            h /= np.linalg.norm(h)
            p = p + h * STEP_NM
            side.append(p)
        sides.append(side)
    centres = np.array([*sides[1][::-1], candidates[start], *sides[0]])
    wanted = radius * (1 + 0.12 * np.sin(np.linspace(0, rng.uniform(2, 7), len(centres)) + rng.uniform(0, 6)))
    radii = np.minimum(wanted, scene.clearance(centres) - rim)
    smooth = ndimage.minimum_filter1d(radii, 5, mode="nearest")
    radii = np.minimum(ndimage.gaussian_filter1d(smooth, 3.0, mode="nearest"), radii)
    if radii.min() < 0.5 * radius:
        return None
    tangents = np.gradient(centres, axis=0) if len(centres) > 1 else heading[None]
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    across = np.cross(heading, rng.normal(size=3)) * (0.4, 1, 1)  # lamellae that a slice cuts edge-on are the ones one sees
    d = scene.domain
    grey = {"mitochondrion": d.matrix, "dense": d.matrix - 6, "multivesicular": d.cytosol - 35}[kind] + rng.normal(0, d.matrix_sd)
    return Tube(kind, centres, tangents, radii, float(grey), across / np.linalg.norm(across), bool(rng.random() < 0.55))


def make_scene(domain: str, shape: tuple[int, int, int], seed: int) -> Scene:
    """Build the tissue for a volume of this shape (z, y, x voxels); the same arguments give the same scene."""
    d = DOMAINS[domain]
    rng = np.random.default_rng([seed, *domain.encode()])
    extent = np.array(shape) * d.voxel_nm
    low, high = np.full(3, -2.0 * MARGIN_NM), extent + 2.0 * MARGIN_NM
    volume = float(np.prod((high - low) / 1000.0))
    squeeze = np.array([d.stretch_z, 1.0, 1.0])
    seeds = rng.uniform(low, high, size=(max(16, int(volume * 1e9 / d.stretch_z / d.cell_nm**3)), 3))
    cell = np.arange(len(seeds))
    for _ in range(int(np.ceil(volume * d.big_cells[0]))):
        axes = d.big_cells[1] * rng.uniform(0.6, 1.4, 3) * (d.stretch_z, 1, 1)
        inside = np.sum(((seeds - rng.uniform(low, high)) / axes) ** 2, axis=1) < 1
        if inside.any():
            cell[inside] = cell[inside][0]
    n = len(seeds)
    grey = d.cytosol + rng.normal(0, d.cytosol_sd, n) - rng.uniform(35, 60, n) * (rng.random(n) < d.glia)
    scene = Scene(
        domain=d, extent=extent, tree=cKDTree(seeds / squeeze), cell=cell, grey=grey, bouton=rng.random(n) < 0.4,
        sheath=rng.random(n) < 0.035, warp=Waves.draw(rng, (420, 1000), 52.0, 3), wiggle=Waves.draw(rng, (110, 240), 6.0, 3),
        mottle=Waves.draw(rng, (150, 460), 1.0, 7, m=28),
    )  # fmt: skip
    probes = rng.uniform(0, 1, size=(4000, 3)) * extent
    covered = np.zeros(len(probes), bool)
    for _ in range(200):  # mitochondria first, until they fill their share of the volume
        if covered.mean() >= d.foreground:
            break
        tube = _grow_tube(scene, rng, "mitochondrion", rng.uniform(*d.radius_nm), rng.uniform(150, 1100))
        if tube is not None:
            scene.tubes.append(tube)
            covered |= tube.sdf(probes)[0] < 0
    for kind, share in (("dense", 1.0), ("multivesicular", 0.35)):
        for _ in range(int(np.ceil(share * d.bodies * float(np.prod((extent + MARGIN_NM) / 1000.0))))):
            tube = _grow_tube(scene, rng, kind, rng.uniform(45, 105), rng.uniform(0, 220))
            if tube is not None:
                scene.tubes.append(tube)
    p = rng.uniform(-60, extent + 60, size=(int(d.vesicles * 3 * np.prod((extent + 120) / 1000.0)), 3))
    core = rng.random(len(p)) < 0.06
    radius = np.where(core, rng.uniform(30, 44, len(p)), rng.uniform(16, 23, len(p)))
    home = scene.bouton[scene.membrane(p)[1]] & (scene.mottle(p)[:, 3] > -0.3)
    keep = (scene.clearance(p) > radius + 8) & (home | (rng.random(len(p)) < 0.06))
    found = np.column_stack([p, radius, core])[keep]
    near = cKDTree(found[:, :3]).query_pairs(38.0) if len(found) else set()
    drop = {max(pair) for pair in near}
    return replace(scene, vesicles=np.array([v for i, v in enumerate(found) if i not in drop]).reshape(-1, 5))


def _band(distance: Array, width: float) -> Array:
    """1 on a surface, falling to 0 within about two widths."""
    return np.exp(-((distance / width) ** 2))


def _ramp(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, linear between."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def _paint_tube(d: Domain, tube: Tube, p: Array, mottle: Array, image: Array, grain: Array) -> Array:
    """Paint an organelle over the points; changes image and grain, returns which points are inside its membrane."""
    s, arc = tube.sdf(p)
    inside = s < 0
    body = np.full(len(p), tube.grey) + 5.0 * mottle[:, 0]
    if tube.kind == "mitochondrion":
        period = 46.0 if tube.lengthwise else 40.0
        along = p @ tube.across if tube.lengthwise else arc
        phase = np.mod(along / period + 0.35 * mottle[:, 4], 1.0) - 0.5
        lamella = _band(phase * period, 6.0) * _ramp(mottle[:, 5], -0.7, 0.0) * _ramp(-s, 20.0, 27.0)
        body += (d.crista - d.matrix) * lamella
        body += 30.0 * _band(s + 14.0, 4.5)  # between the two membranes
        wall = _band(s + 4.0, 5.0) + 0.7 * _band(s + 23.0, 5.0)
    elif tube.kind == "dense":
        wall = np.zeros(len(p))
    else:  # small vesicles in a pale body
        blobs = np.cos(p[:, 0] / 7.5 + mottle[:, 4]) * np.cos(p[:, 1] / 7.5 + mottle[:, 5]) * np.cos(p[:, 2] / 7.5)
        body += (d.membrane - d.cytosol) * 0.6 * _ramp(blobs, 0.25, 0.7) * _ramp(-s, 8.0, 16.0)
        wall = _band(s + 4.0, 5.0)
    body += (0.85 * d.membrane + 10.0 - body) * np.clip(wall, 0, 1)
    cover = _ramp(-s, -3.0, 3.0)
    image += (body - image) * cover
    grain += (0.75 - grain) * cover
    return inside


def _plane(scene: Scene, z: float, y: Array, x: Array) -> tuple[Array, Array, Array]:
    """One infinitely thin section at z, rows y and columns x (nm) -> grey, label (bool), strength of the grain; all (Y, X)."""
    d, shape = scene.domain, (len(y), len(x))
    p = np.stack(np.broadcast_arrays(z, *np.meshgrid(y, x, indexing="ij")), axis=-1).reshape(-1, 3)
    border, cell = scene.membrane(p, 75.0, scene.warp.plane(z, y, x) + scene.wiggle.plane(z, y, x))
    mottle = scene.mottle.plane(z, y, x)
    image = scene.grey[cell] + 7.0 * mottle[:, 0]
    grain = 0.25 + 0.75 * _ramp(mottle[:, 6], -1.2, 1.0)

    sheet = np.abs(mottle[:, 2]) * 40.0  # nm from a level surface of the field, which is about as steep as that
    reticulum = _band(sheet - 13.0, 6.0) * _ramp(mottle[:, 3], 0.7, 1.0) * _ramp(border, 18.0, 32.0)
    image += (d.vesicle - image) * 0.8 * reticulum

    def window(centre: Array, radius: float) -> tuple[slice, slice]:
        """Rows and columns that a ball can touch."""
        (y0, y1), (x0, x1) = (np.searchsorted(a, (c - radius, c + radius)) for a, c in ((y, centre[1]), (x, centre[2])))
        return slice(y0, y1), slice(x0, x1)

    grid, image2, grain2 = p.reshape(*shape, 3), image.reshape(shape), grain.reshape(shape)  # views
    for v in scene.vesicles[np.abs(scene.vesicles[:, 0] - z) < scene.vesicles[:, 3] + 6]:
        rows, columns = window(v, v[3] + 6)
        r = np.sqrt(((grid[rows, columns] - v[:3]) ** 2).sum(axis=-1))
        if v[4]:  # dense core: a black dot in a pale ring
            ink, paper = _ramp(0.62 * v[3] - r, -4, 4) + 0.6 * _band(r - v[3], 4.0), _ramp(v[3] - r, -2, 2)
            image2[rows, columns] += (d.cytosol + 10 - image2[rows, columns]) * paper
        else:
            ink = _band(r - v[3], 6.0) + 0.3 * _ramp(v[3] - r, -2, 2)
        image2[rows, columns] += (d.vesicle - image2[rows, columns]) * np.clip(ink, 0, 1)

    label = np.zeros(shape, bool)
    for tube in scene.tubes:
        reach = tube.radii.max() + 6
        if np.abs(tube.centres[:, 0] - z).min() > reach:
            continue
        (y0, x0), (y1, x1) = tube.centres[:, 1:].min(axis=0) - reach, tube.centres[:, 1:].max(axis=0) + reach
        rows, columns = slice(*np.searchsorted(y, (y0, y1))), slice(*np.searchsorted(x, (x0, x1)))
        part = grid[rows, columns]
        if part.size == 0:
            continue
        piece, rough = image2[rows, columns].ravel(), grain2[rows, columns].ravel()
        m = mottle.reshape(*shape, -1)[rows, columns].reshape(-1, mottle.shape[1])
        inside = _paint_tube(d, tube, part.reshape(-1, 3), m, piece, rough).reshape(part.shape[:2])
        image2[rows, columns], grain2[rows, columns] = piece.reshape(inside.shape), rough.reshape(inside.shape)
        if tube.kind == "mitochondrion":
            label[rows, columns] |= inside

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
    across, along = yy * np.cos(angle) + xx * np.sin(angle) - offset, xx * np.cos(angle) - yy * np.sin(angle)
    if rng.random() < 0.5:
        winding = 7 * np.sin(along / rng.uniform(25, 60) + rng.uniform(0, 6))
        image *= 1 - 0.6 * _band(across - winding, rng.uniform(3, 6)) * _ramp(along, -0.3 * w, 0.0)
    else:
        image += 28 * _band(across, 1.5) - 28 * _band(across - 4, 1.5)


def make_volume(domain: str, shape: tuple[int, int, int], seed: int) -> tuple[Array, Array]:
    """Image a scene.

    Args:
        domain: a key of `DOMAINS`.
        shape: z, y, x voxels.
        seed: of the scene and of the noise; the same arguments give the same arrays.

    Returns:
        The image, uint8 (Z, Y, X), and the label, uint8 0/1 of the same shape: 1 within the outer membrane of a mitochondrion.
    """
    scene = make_scene(domain, shape, seed)
    d, (nz, ny, nx) = scene.domain, shape
    rng = np.random.default_rng([seed, *domain.encode(), 1])
    image, grain = np.zeros(shape), np.zeros(shape)
    label = np.zeros(shape, np.uint8)
    for i in range(nz):
        shift = rng.normal(0, d.jitter_px, 2)
        z, y, x = i * d.voxel_nm[0], (np.arange(ny) + shift[0]) * d.voxel_nm[1], (np.arange(nx) + shift[1]) * d.voxel_nm[2]
        for offset in d.slab_nm:
            grey, inside, rough = _plane(scene, z + offset, y, x)
            image[i] += grey / len(d.slab_nm)
            grain[i] += rough / len(d.slab_nm)
            if offset == 0:
                label[i] = inside

    def texture(scale: Array | tuple[float, ...]) -> Array:
        """White noise, smoothed by a length in voxels per axis, with a standard deviation of 1."""
        t = ndimage.gaussian_filter(rng.normal(size=shape), scale, mode="wrap")
        return t / t.std()

    specks = texture(np.divide(d.grain_nm, d.voxel_nm))
    image += d.cloud * grain * texture(np.divide(d.cloud_nm, d.voxel_nm))
    image += d.grain * grain * (specks - 1.0 * np.maximum(-specks - 0.8, 0))  # grains are darker than their surroundings
    image = ndimage.gaussian_filter(image, (d.blur_z, d.blur_px, d.blur_px), mode="nearest")
    image += d.shading * texture((d.blur_z * 6, ny / 6, nx / 6))
    for section in image:
        if rng.random() < d.defects:
            _spoil_section(section, rng)
    image += d.noise * texture((0, d.noise_px, d.noise_px))
    gain, offset = rng.normal(1, d.gain_sd, (nz, 1, 1)), rng.normal(0, d.offset_sd, (nz, 1, 1))
    image = (image - image.mean()) * gain + image.mean() + offset
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def write_phantoms(root: Path, seed: int = 0, shapes: dict[str, dict[str, tuple[int, int, int]]] = SHAPES) -> list[Path]:
    """Write `root/<domain>/<train|test>/{image,label}.tif`, deflated, without dates: the same seed gives the same bytes.

    Train and test are different scenes of one domain. Returns the files written.
    """
    written = []
    for domain, parts in shapes.items():
        for number, (part, shape) in enumerate(parts.items()):
            folder = Path(root) / domain / part
            folder.mkdir(parents=True, exist_ok=True)
            for name, array in zip(("image", "label"), make_volume(domain, shape, 10 * seed + number), strict=True):
                path, temporary = folder / f"{name}.tif", folder / f".{name}.tif.part"
                tifffile.imwrite(
                    temporary, array, photometric="minisblack", compression="zlib", predictor=name == "image", software=False,
                    datetime=None, metadata=None,
                )  # fmt: skip
                temporary.replace(path)
                written.append(path)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m emadapt.data.phantom OUT")
    for file in write_phantoms(Path(sys.argv[1])):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
