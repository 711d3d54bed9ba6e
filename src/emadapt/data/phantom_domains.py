"""How tissue and microscope look in each synthetic dataset.

The grey levels, noise and sizes follow statistics measured on the EPFL hippocampus (Lucchi et al.
2012) and on the Drosophila ventral nerve cord (Gerhard et al. 2013). No pixel of either is in here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Domain:
    """One kind of microscope and tissue.

    Grey levels are 0-255; lengths in nm, or in in-plane pixels where they say px.
    """

    voxel_nm: tuple[float, float, float]  # z, y, x
    slab_nm: tuple[float, ...]  # planes averaged in a slice: a thick section is seen in projection
    cell_nm: float  # mean distance of the Voronoi seeds
    stretch_z: float  # neurites that run along z
    big_cells: tuple[float, float]  # per cubic micron, radius: these swallow the seeds inside them
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
"""Domains whose labels tell organelles apart (`phantom.CLASSES`), at three voxel sizes."""
