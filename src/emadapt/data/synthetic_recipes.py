"""Kinds of tissue for synthetic EM: what a domain is made of, drawn at random.

A recipe knows the arrangement of one tissue (neuropil, liver, muscle, glands, blood, cultured
cells, epithelium): how large cells are, what lies between them, and how many organelles of which
size a section shows. Sizes are those of textbooks of ultrastructure, with wide margins. Stains are
in units of a domain's contrast: 0 is the cytosol, -1 a membrane seen edge-on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

Range = tuple[float, float]
Rng = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """Organelles of one kind.

    Attributes:
        per_um2: that a section shows, per square micron.
        radius: nm.
        length: of the centre line, nm; 0 is a sphere.
    """

    per_um2: float
    radius: Range
    length: Range = (0.0, 0.0)


@dataclass(frozen=True)
class Tissue:
    """One arrangement of cells and organelles; lengths in nm, shares in [0, 1]."""

    name: str
    cell_nm: float  # mean distance of the Voronoi seeds of cells
    merged: float = 0.0  # share of the seeds that join large cells
    stretch: float = 1.0  # of cells along one direction
    cleft_nm: float = 8.0  # half the distance between neighbours
    dark: float = 0.08  # share of the cells with dark cytosol
    lumen: float = 0.0  # share of the cells that are not cells but space between them
    filling: str = "resin"  # of that space: resin, fluid, microvilli, collagen, erythrocyte
    sheath: float = 0.0  # share of the cells wrapped in myelin
    nucleus: float = 0.0  # probability of a nucleus in the field of view
    fibrils: bool = False  # muscle
    reticulum: float = 0.3  # share of the cytosol with single sheets and tubes of ER
    stacks: float = 0.0  # share of the cytosol with stacks of ER
    golgi: float = 0.05
    hugging: float = 0.0  # share of the surroundings of organelles with ER along them
    glycogen: float = 0.0  # strength of dark grains in the cytosol
    vesicles: float = 2.0  # per square micron, where they are in crowds
    bodies: dict[str, Kind] = field(default_factory=dict)


def _many(rng: Rng, low: float, high: float) -> float:
    """A density: uniform in its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def neuropil(rng: Rng) -> Tissue:
    """Thin neurites, synapses, myelin."""
    return Tissue(
        "neuropil",
        cell_nm=rng.uniform(200, 520),
        merged=rng.uniform(0.2, 0.6),
        stretch=rng.uniform(1.0, 2.2),
        cleft_nm=rng.choice([0.0, 6.0, 10.0]),
        dark=rng.uniform(0.03, 0.2),
        sheath=rng.choice([0.0, 0.04, 0.12]),
        nucleus=0.3,
        reticulum=rng.uniform(0.1, 0.35),
        vesicles=_many(rng, 40, 400),
        bodies={
            "mitochondrion": Kind(_many(rng, 0.8, 2.0), (75, 200), (80, 1800)),
            "lysosome": Kind(_many(rng, 0.03, 0.25), (60, 200), (0, 250)),
            "multivesicular": Kind(_many(rng, 0.03, 0.2), (70, 160), (0, 150)),
            "vacuole": Kind(_many(rng, 0.02, 0.3), (40, 160), (0, 200)),
            "core": Kind(_many(rng, 0.02, 0.8), (30, 60)),
        },
    )


def liver(rng: Rng) -> Tissue:
    """Hepatocytes: large mitochondria, peroxisomes, ER around organelles, glycogen."""
    return Tissue(
        "liver",
        cell_nm=rng.uniform(5000, 9000),
        lumen=0.2,
        filling=rng.choice(["microvilli", "fluid"]),
        nucleus=0.4,
        reticulum=rng.uniform(0.2, 0.6),
        stacks=rng.uniform(0.1, 0.6),
        hugging=rng.uniform(0.2, 0.9),
        glycogen=rng.uniform(0, 1.6),
        vesicles=_many(rng, 0.3, 4),
        bodies={
            "lipid": Kind(_many(rng, 0.005, 0.12), (120, 900)),
            "mitochondrion": Kind(_many(rng, 0.4, 1.0), (160, 480), (0, 1300)),
            "peroxisome": Kind(_many(rng, 0.03, 0.3), (120, 320)),
            "lysosome": Kind(_many(rng, 0.02, 0.2), (100, 320), (0, 200)),
        },
    )


def muscle(rng: Rng) -> Tissue:
    """Fibrils with mitochondria between them."""
    return Tissue(
        "muscle",
        cell_nm=rng.uniform(4000, 9000),
        stretch=1.5,
        lumen=0.15,
        filling=rng.choice(["collagen", "fluid"]),
        nucleus=0.1,
        fibrils=True,
        reticulum=0.15,
        glycogen=rng.uniform(0, 1.2),
        bodies={
            "lipid": Kind(_many(rng, 0.005, 0.08), (120, 500)),
            "mitochondrion": Kind(_many(rng, 0.3, 1.1), (90, 380), (100, 2200)),
            "lysosome": Kind(_many(rng, 0.01, 0.06), (80, 250)),
        },
    )


def gland(rng: Rng) -> Tissue:
    """Granules of secretion, stacks of ER, large nuclei."""
    granule, radii = str(rng.choice(["granule", "core"])), (90, 240)
    if granule == "granule":
        radii = (140, 560)
    return Tissue(
        "gland",
        cell_nm=rng.uniform(2500, 6000),
        lumen=0.15,
        filling=rng.choice(["fluid", "microvilli", "collagen"]),
        nucleus=0.35,
        reticulum=rng.uniform(0.1, 0.4),
        stacks=rng.uniform(0.2, 0.8),
        golgi=0.15,
        hugging=rng.uniform(0, 0.6),
        vesicles=_many(rng, 0.5, 8),
        bodies={
            granule: Kind(_many(rng, 0.15, 1.6), radii, (0, 120)),
            "mitochondrion": Kind(_many(rng, 0.3, 0.9), (100, 280), (0, 1800)),
            "lysosome": Kind(_many(rng, 0.02, 0.15), (90, 300)),
            "lipid": Kind(_many(rng, 0.003, 0.04), (120, 400)),
        },
    )


def blood(rng: Rng) -> Tissue:
    """Platelets and other small cells in plasma."""
    return Tissue(
        "blood",
        cell_nm=rng.uniform(900, 2600),
        stretch=rng.uniform(1.0, 2.5),
        cleft_nm=rng.uniform(10, 90),
        dark=0.15,
        lumen=rng.uniform(0.1, 0.45),
        filling=rng.choice(["fluid", "fluid", "erythrocyte"]),
        nucleus=0.1,
        reticulum=rng.uniform(0.05, 0.4),
        glycogen=rng.uniform(0, 1.6),
        vesicles=_many(rng, 0.5, 10),
        bodies={
            "granule": Kind(_many(rng, 0.6, 3.0), (70, 200), (0, 150)),
            "mitochondrion": Kind(_many(rng, 0.3, 0.9), (70, 190), (0, 500)),
            "vacuole": Kind(_many(rng, 0.2, 1.5), (40, 160), (0, 500)),
            "core": Kind(_many(rng, 0.02, 0.3), (60, 120)),
        },
    )


def cultured(rng: Rng) -> Tissue:
    """Sparse cells with long mitochondria in empty resin."""
    return Tissue(
        "cultured",
        cell_nm=rng.uniform(3500, 9000),
        lumen=rng.uniform(0.1, 0.4),
        filling=rng.choice(["resin", "resin", "microvilli"]),
        nucleus=0.4,
        reticulum=rng.uniform(0.1, 0.6),
        stacks=rng.choice([0.0, 0.2]),
        golgi=0.1,
        glycogen=rng.choice([0.0, 0.8]),
        vesicles=_many(rng, 0.5, 8),
        bodies={
            "mitochondrion": Kind(_many(rng, 0.35, 1.0), (80, 270), (200, 3000)),
            "lysosome": Kind(_many(rng, 0.03, 0.3), (90, 350), (0, 200)),
            "multivesicular": Kind(_many(rng, 0.02, 0.2), (90, 280)),
            "vacuole": Kind(_many(rng, 0.02, 0.4), (60, 400), (0, 300)),
            "lipid": Kind(_many(rng, 0.003, 0.05), (100, 400)),
        },
    )


def epithelium(rng: Rng) -> Tissue:
    """Cells with microvilli or collagen between them."""
    return Tissue(
        "epithelium",
        cell_nm=rng.uniform(1500, 5000),
        stretch=rng.uniform(1.0, 2.0),
        dark=0.2,
        lumen=0.25,
        filling=rng.choice(["microvilli", "microvilli", "collagen"]),
        nucleus=0.3,
        reticulum=rng.uniform(0.1, 0.5),
        golgi=0.1,
        vesicles=_many(rng, 1, 12),
        bodies={
            "mitochondrion": Kind(_many(rng, 0.35, 1.1), (90, 300), (100, 2500)),
            "lysosome": Kind(_many(rng, 0.03, 0.3), (90, 350)),
            "vacuole": Kind(_many(rng, 0.02, 0.5), (60, 350), (0, 200)),
            "granule": Kind(_many(rng, 0.02, 0.3), (90, 300)),
        },
    )


RECIPES: tuple[Callable[[Rng], Tissue], ...] = (
    neuropil,
    liver,
    neuropil,
    muscle,
    cultured,
    gland,
    blood,
    epithelium,
)
"""Neuropil twice: most published volumes are of it."""


@dataclass(frozen=True)
class Stain:
    """How dark things are: 0 is the cytosol, -1 a membrane seen edge-on."""

    matrix: float
    matrix_sd: float  # between mitochondria
    crista: float  # membranes of cristae
    core: float  # the space within cristae
    sealed: float  # share of the mitochondria whose cristae are only dark lines
    gap: float  # between the two membranes of mitochondria and nuclei
    lysosome: float
    lipid: float
    granule: float
    peroxisome: float
    chromatin: float
    nucleoplasm: float
    lumen: float  # inside vacuoles
    reticulum: float  # inside ER and vesicles
    space: float  # between cells
    membrane_nm: float  # half width


def draw_stain(rng: Rng) -> Stain:
    """A stain: in a quarter of the domains mitochondria are as pale as the cytosol, or paler."""
    pale = rng.random() < 0.25
    least = 0.35 if pale else 0.2  # then only cristae tell them from the cytosol
    matrix = rng.uniform(-0.2, 0.2) if pale else -rng.uniform(0.2, 0.8)
    return Stain(
        matrix=matrix,
        matrix_sd=rng.uniform(0.02, 0.12),
        crista=max(matrix - rng.uniform(least, 0.75), -1.15),
        core=min(matrix + rng.uniform(least, 0.8), 0.5),
        sealed=rng.uniform(0, 1),
        gap=rng.uniform(-0.4, 0.3),
        lysosome=-rng.uniform(0.3, 1.2),
        lipid=rng.choice([rng.uniform(0.2, 0.8), -rng.uniform(0.2, 1.1)]),
        granule=-rng.uniform(-0.1, 1.1),
        peroxisome=-rng.uniform(0.1, 0.6),
        chromatin=-rng.uniform(0.25, 0.9),
        nucleoplasm=rng.uniform(-0.2, 0.25),
        lumen=rng.uniform(-0.1, 0.5),
        reticulum=rng.uniform(-0.8, 0.5),
        space=rng.uniform(-0.3, 0.55),
        membrane_nm=rng.uniform(4.5, 9.0),
    )


def draw_tissue(number: int, rng: Rng) -> Tissue:
    """The tissue of domain `number`: recipes take turns, every density varies."""
    tissue = RECIPES[number % len(RECIPES)](rng)
    bodies = {
        kind: replace(body, per_um2=body.per_um2 * float(rng.uniform(0.6, 1.5)))
        for kind, body in tissue.bodies.items()
    }
    return replace(tissue, bodies=bodies)
