"""How tissue and microscope look in each synthetic dataset.

The grey levels, noise and sizes follow statistics measured on the EPFL hippocampus (Lucchi et al.
2012) and on the Drosophila ventral nerve cord (Gerhard et al. 2013). No pixel of either is in here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Domain:
    """One kind of microscope and tissue; the defaults are FIB-SEM.

    Grey levels are 0-255; lengths in nm, or in in-plane pixels where they say px.
    """

    voxel_nm: tuple[float, float, float] = (5.0, 5.0, 5.0)  # z, y, x
    slab_nm: tuple[float, ...] = (0.0,)  # planes averaged in a slice: a section is a projection
    cell_nm: float = 285.0  # mean distance of the Voronoi seeds
    stretch_z: float = 1.0  # neurites that run along z
    big_cells: tuple[float, float] = (5.0, 400.0)  # per cubic micron, radius: they swallow seeds
    cytosol: float = 167.0
    cytosol_sd: float = 9.0  # between cells
    glia: float = 0.08  # share of the cells that are dark
    membrane: float = 56.0
    membrane_nm: float = 7.5  # half width
    cleft_nm: float = 9.0  # half the distance of the two membranes of neighbours
    matrix: float = 104.0  # inside a mitochondrion
    matrix_sd: float = 8.0
    crista: float = 62.0  # grey of the lamellae
    radius_nm: tuple[float, float] = (80.0, 165.0)  # of mitochondria
    foreground: float = 0.072  # share of the volume aimed at
    vesicle: float = 88.0
    vesicles: float = 7000.0  # per cubic micron
    bodies: float = 22.0  # dense bodies per cubic micron
    grain: float = 9.0  # sd of the texture of cytoplasm and organelles
    grain_nm: float = 7.0
    cloud: float = 15.0  # sd of the coarser texture of the cytosol
    cloud_nm: float = 15.0
    blur_px: float = 1.35  # point spread in the plane
    blur_z: float = 0.6  # in slices
    shading: float = 9.0  # sd of the uneven background
    noise: float = 13.0  # sd of the detector's noise
    noise_px: float = 0.0  # its correlation length
    jitter_px: float = 0.15  # sd of the residual shift of a section
    gain_sd: float = 0.02  # contrast, between slices
    offset_sd: float = 3.0  # brightness, between slices
    defects: float = 0.0  # share of the sections with a fold or knife mark
    lipids: float = 0.0  # lipid droplets per cubic micron
    lipid: float = 0.0  # their grey


DOMAINS: dict[str, Domain] = {
    "phantom_fib": Domain(),
    "phantom_tem": Domain(
        voxel_nm=(50.0, 4.6, 4.6),
        slab_nm=(-10.0, 0.0, 10.0),
        cell_nm=225.0,
        stretch_z=1.7,
        big_cells=(6, 330.0),
        cytosol=172.0,
        cytosol_sd=7.0,
        membrane=36.0,
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
    "organelles_5nm": Domain(lipids=120.0, lipid=232.0),
    "organelles_8nm": Domain(voxel_nm=(8.0, 8.0, 8.0), lipids=120.0, lipid=40.0),
    "organelles_30nm": replace(
        DOMAINS["phantom_tem"], voxel_nm=(30.0, 6.0, 6.0), lipids=120.0, lipid=215.0
    ),
}
"""Domains whose labels tell organelles apart (`phantom.CLASSES`), at three voxel sizes."""
