"""Synthetic tissue: everything that a phantom's microscope looks at, continuous and in nanometres.

A scene is warped Voronoi cells, and in the cells mitochondria (double membrane, cristae; the label), vesicles, and what is
mistaken for mitochondria when only darkness counts: dense bodies, multivesicular bodies, dense-core vesicles, synaptic
densities, sheaths of several membranes, strips of endoplasmic reticulum, dark glia. `emadapt.data.phantom` images it.

The grey levels, noise and sizes follow statistics measured on the EPFL hippocampus (Lucchi et al. 2012) and on the
Drosophila ventral nerve cord (Gerhard et al. 2013). No pixel of either is in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

Array = np.ndarray
MARGIN_NM = 260.0  # the scene is larger than the volume, so that objects are cut by its faces
_CORNERS = np.array([c for c in np.ndindex(3, 3, 3) if c != (1, 1, 1)]) - 1.0
DIRECTIONS = _CORNERS / np.linalg.norm(_CORNERS, axis=1, keepdims=True)  # 26 all around
STEP_NM = (
    12.0  # between the spheres whose union is a tube: a scallop of 0.2 nm at a radius of 100 nm
)


@dataclass(frozen=True)
class Domain:
    """How one kind of microscope and tissue looks. Grey levels are 0-255, lengths in nm unless they say px (in-plane pixels)."""

    voxel_nm: tuple[float, float, float]  # z, y, x
    slab_nm: tuple[float, ...]  # planes averaged in a slice: a thick section is seen in projection
    cell_nm: float  # mean distance of the Voronoi seeds
    stretch_z: float  # neurites that run along z
    big_cells: tuple[
        float, float
    ]  # number per cubic micron, radius: these swallow the seeds inside them
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
    contrast: float = 1.0  # of the finished image, around its mean
    lipids: float = 0.0  # lipid droplets per cubic micron
    lipid: float = 0.0  # their grey


DOMAINS: dict[str, Domain] = {
    "phantom_fib": Domain(
        voxel_nm=(5.0, 5.0, 5.0),
        slab_nm=(0.0,),
        cell_nm=285.0,
        stretch_z=1.0,
        big_cells=(5.0, 400.0),
        cytosol=167.0,
        cytosol_sd=9.0,
        glia=0.08,
        membrane=56.0,
        membrane_nm=7.5,
        cleft_nm=9.0,
        matrix=104.0,
        matrix_sd=8.0,
        crista=62.0,
        radius_nm=(80.0, 165.0),
        foreground=0.072,
        vesicle=88.0,
        vesicles=7000.0,
        bodies=22.0,
        grain=9.0,
        grain_nm=7.0,
        cloud=15.0,
        cloud_nm=15.0,
        blur_px=1.35,
        blur_z=0.6,
        shading=9.0,
        noise=13.0,
        noise_px=0.0,
        jitter_px=0.15,
        gain_sd=0.02,
        offset_sd=3.0,
        defects=0.0,
    ),
    "phantom_tem": Domain(
        voxel_nm=(50.0, 4.6, 4.6),
        slab_nm=(-10.0, 0.0, 10.0),
        cell_nm=225.0,
        stretch_z=1.7,
        big_cells=(6, 330.0),
        cytosol=172.0,
        cytosol_sd=7.0,
        glia=0.08,
        membrane=36.0,
        membrane_nm=7.5,
        cleft_nm=0.0,
        matrix=82.0,
        matrix_sd=10.0,
        crista=172.0,
        radius_nm=(85.0, 150.0),
        foreground=0.062,
        vesicle=95.0,
        vesicles=600.0,
        bodies=13.0,
        grain=26.0,
        grain_nm=6.0,
        cloud=12.0,
        cloud_nm=13.0,
        blur_px=0.5,
        blur_z=0.0,
        shading=5.0,
        noise=18.0,
        noise_px=0.62,
        jitter_px=1.2,
        gain_sd=0.015,
        offset_sd=1.0,
        defects=0.2,
    ),
}

ORGANELLES: dict[str, Domain] = {
    "organelles_5nm": replace(DOMAINS["phantom_fib"], lipids=120.0, lipid=232.0),
    "organelles_8nm": replace(
        DOMAINS["phantom_fib"], voxel_nm=(8.0, 8.0, 8.0), lipids=120.0, lipid=40.0
    ),
    "organelles_30nm": replace(
        DOMAINS["phantom_tem"], voxel_nm=(30.0, 6.0, 6.0), lipids=120.0, lipid=215.0
    ),
}
"""Domains whose labels tell organelles apart, see `emadapt.data.phantom.CLASSES`; at three voxel sizes."""


@dataclass(frozen=True)
class Waves:
    """A smooth random field of space: a sum of plane waves, defined everywhere, so no grid limits a slice."""

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
        """Waves of random direction, wavelengths in nm uniform in the range; each channel has the given standard deviation."""
        direction = rng.normal(size=(m, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        amplitude = rng.normal(size=(m, channels))
        amplitude *= sd * np.sqrt(2) / np.linalg.norm(amplitude, axis=0)
        return cls(
            direction * (2 * np.pi / rng.uniform(*wavelength, m))[:, None],
            rng.uniform(0, 2 * np.pi, m),
            amplitude,
        )

    def __call__(self, p: Array) -> Array:
        """(N, 3) points in nm -> (N, C)."""
        z, y, x = np.ascontiguousarray(p.T)
        out = np.zeros(
            (self.amplitude.shape[1], len(p))
        )  # one channel after the other: twice as fast
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
        rows, columns = (
            np.concatenate([np.cos(a), -np.sin(a)], axis=1),
            np.concatenate([np.cos(b), np.sin(b)], axis=1),
        )
        weighted = rows * np.concatenate([self.amplitude, self.amplitude]).T[:, None]  # (C, Y, 2M)
        out = np.empty((len(weighted), len(y), len(x)))
        for channel, w in enumerate(weighted):
            np.einsum("ym,mx->yx", w, columns.T.copy(), out=out[channel])
        return out.reshape(len(out), -1).T


@dataclass(frozen=True)
class Tube:
    """A union of spheres along a bent line: an organelle."""

    kind: str  # mitochondrion, dense, multivesicular, lipid
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
    vesicles: Array = field(
        default_factory=lambda: np.zeros((0, 5))
    )  # z, y, x, radius, dense core 0/1

    def membrane(
        self, p: Array, reach: float = 250.0, warped: Array | None = None
    ) -> tuple[Array, Array]:
        """(N, 3) points in nm -> (distance to the next cell's border in nm, at most about `reach`; index of the cell)."""
        q = (p + (self.warp(p) + self.wiggle(p) if warped is None else warped)) / (
            self.domain.stretch_z,
            1.0,
            1.0,
        )
        d, i = self.tree.query(q, k=min(8, len(self.cell)))
        seeds, own = self.tree.data, self.cell[i[:, 0]]
        inverse = np.full(len(p), np.exp(-reach / 9.0))
        for j in range(
            1, i.shape[1]
        ):  # distance to each bisecting plane; a soft minimum rounds the corners of the cells
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
            far = np.sqrt(
                (q[:, 0] - centres[0]) ** 2
                + (q[:, 1] - centres[1]) ** 2
                + (q[:, 2] - centres[2]) ** 2
            )
            free[i : i + step] = np.minimum(free[i : i + step], (far - radii).min(axis=1))
        return free


def _grow_tube(
    scene: Scene, rng: np.random.Generator, kind: str, radius: float, length: float
) -> Tube | None:
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
            ahead = scene.clearance(
                p + turns * 3 * STEP_NM
            )  # look ahead and bend away from the walls
            best = int(np.argmax(ahead))
            if ahead[best] < 0.6 * radius + rim:
                break
            h = 0.7 * h + 0.3 * turns[best]
            h /= np.linalg.norm(h)
            p = p + h * STEP_NM
            side.append(p)
        sides.append(side)
    centres = np.array([*sides[1][::-1], candidates[start], *sides[0]])
    wanted = radius * (
        1 + 0.12 * np.sin(np.linspace(0, rng.uniform(2, 7), len(centres)) + rng.uniform(0, 6))
    )
    radii = np.minimum(wanted, scene.clearance(centres) - rim)
    home = scene.membrane(candidates[start : start + 1])[1]
    for _ in range(
        6
    ):  # clearance is an estimate where space is warped: shrink what still comes near a border
        slim = ndimage.minimum_filter1d(radii, 5, mode="nearest")
        radii = np.minimum(ndimage.gaussian_filter1d(slim, 3.0, mode="nearest"), radii)
        if radii.min() < 0.5 * radius:
            return None
        skin = centres[:, None] + DIRECTIONS * (radii[:, None, None] + 6.0)  # (N, 26, 3)
        border, cell = scene.membrane(skin.reshape(-1, 3), reach=30.0)
        tight = ((border < 8.0) | (cell != home)).reshape(skin.shape[:2]).any(axis=1)
        if not tight.any():
            break
        radii[tight] *= 0.88
    else:
        return None
    tangents = np.gradient(centres, axis=0) if len(centres) > 1 else heading[None]
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    across = np.cross(heading, rng.normal(size=3)) * (
        0.4,
        1,
        1,
    )  # lamellae that a slice cuts edge-on are the ones one sees
    d = scene.domain
    grey = {
        "mitochondrion": d.matrix,
        "dense": d.matrix - 14,
        "multivesicular": d.cytosol - 35,
        "lipid": d.lipid,
    }[kind]
    grey += rng.normal(0, d.matrix_sd)
    return Tube(
        kind,
        centres,
        tangents,
        radii,
        grey,
        across / np.linalg.norm(across),
        bool(rng.random() < 0.55),
    )


def make_scene(domain: str, shape: tuple[int, int, int], seed: int) -> Scene:
    """Build the tissue for a volume of this shape (z, y, x voxels); the same arguments give the same scene."""
    d = (DOMAINS | ORGANELLES)[domain]
    rng = np.random.default_rng([seed, *domain.encode()])
    extent = np.array(shape) * d.voxel_nm
    low, high = np.full(3, -2.0 * MARGIN_NM), extent + 2.0 * MARGIN_NM
    volume = float(np.prod((high - low) / 1000.0))
    squeeze = np.array([d.stretch_z, 1.0, 1.0])
    seeds = rng.uniform(
        low, high, size=(max(16, int(volume * 1e9 / d.stretch_z / d.cell_nm**3)), 3)
    )
    cell = np.arange(len(seeds))
    for _ in range(int(np.ceil(volume * d.big_cells[0]))):
        axes = d.big_cells[1] * rng.uniform(0.6, 1.4, 3) * (d.stretch_z, 1, 1)
        inside = np.sum(((seeds - rng.uniform(low, high)) / axes) ** 2, axis=1) < 1
        if inside.any():
            cell[inside] = cell[inside][0]
    n = len(seeds)
    grey = (
        d.cytosol
        + rng.normal(0, d.cytosol_sd, n)
        - rng.uniform(35, 60, n) * (rng.random(n) < d.glia)
    )
    scene = Scene(
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
    probes = rng.uniform(0, 1, size=(4000, 3)) * extent
    covered = np.zeros(len(probes), bool)
    for _ in range(200):  # mitochondria first, until they fill their share of the volume
        if covered.mean() >= d.foreground:
            break
        tube = _grow_tube(
            scene, rng, "mitochondrion", rng.uniform(*d.radius_nm), rng.uniform(150, 1100)
        )
        if tube is not None:
            scene.tubes.append(tube)
            covered |= tube.sdf(probes)[0] < 0
    for kind, share in (("dense", 1.0), ("multivesicular", 0.35)):
        for _ in range(
            int(np.ceil(share * d.bodies * float(np.prod((extent + MARGIN_NM) / 1000.0))))
        ):
            tube = _grow_tube(scene, rng, kind, rng.uniform(40, 90), rng.uniform(0, 220))
            if tube is not None:
                scene.tubes.append(tube)
    for _ in range(int(np.ceil(d.lipids * float(np.prod((extent + MARGIN_NM) / 1000.0))))):
        tube = _grow_tube(scene, rng, "lipid", rng.uniform(50, 110), 0.0)
        if tube is not None:
            scene.tubes.append(tube)
    p = rng.uniform(
        -60, extent + 60, size=(int(d.vesicles * 3 * np.prod((extent + 120) / 1000.0)), 3)
    )
    core = rng.random(len(p)) < 0.06
    radius = np.where(core, rng.uniform(30, 44, len(p)), rng.uniform(16, 23, len(p)))
    home = scene.bouton[scene.membrane(p)[1]] & (scene.mottle(p)[:, 3] > -0.3)
    keep = (scene.clearance(p) > radius + 8) & (home | (rng.random(len(p)) < 0.06))
    found = np.column_stack([p, radius, core])[keep]
    near = cKDTree(found[:, :3]).query_pairs(38.0) if len(found) else set()
    drop = {max(pair) for pair in near}
    return replace(
        scene, vesicles=np.array([v for i, v in enumerate(found) if i not in drop]).reshape(-1, 5)
    )
