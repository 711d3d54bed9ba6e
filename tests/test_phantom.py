"""The phantoms are reproducible, look like their domains by the numbers, and are no easy task."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from emadapt.data.layouts import find_parts
from emadapt.data.phantom import CLASSES, SHAPES, make_volume, write_phantoms
from emadapt.data.phantom_domains import DOMAINS, ORGANELLES
from emadapt.data.phantom_scene import Scene, Waves, make_scene

SHAPE = {"phantom_fib": (10, 224, 224), "phantom_tem": (6, 224, 224)}
TINY = {name: {"train": (3, 48, 64), "test": (2, 48, 64)} for name in DOMAINS}
Volumes = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def volumes() -> Volumes:
    return {name: make_volume(name, SHAPE[name], seed=3) for name in DOMAINS}


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    return {name: make_scene(name, SHAPE[name], seed=3) for name in DOMAINS}


def test_same_seed_same_bytes_and_other_tissue_for_test(tmp_path: Path) -> None:
    runs = {"one": 1, "same": 1, "other": 2}
    files = {run: write_phantoms(tmp_path / run, seed, TINY) for run, seed in runs.items()}
    one, same, other = ([f.read_bytes() for f in files[run]] for run in runs)
    assert len(one) == 8
    assert one == same
    for file, here, there in zip(files["one"], one, other, strict=True):
        assert (here == there) <= (file.name == "label.tif")
    for domain in DOMAINS:
        paths = [tmp_path / "one" / domain / part / "image.tif" for part in ("train", "test")]
        a, b = (tifffile.imread(path)[0].ravel() for path in paths)
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.4
    parts = find_parts(tmp_path / "one/phantom_fib", "stack", "number")
    assert {part.name: part.images.shape for part in parts} == TINY["phantom_fib"]
    with tifffile.TiffFile(files["one"][0]) as tif:
        assert not {"DateTime", "Software"} & {tag.name for tag in tif.pages.first.tags}


@pytest.mark.slow
def test_embedded_data_are_what_the_generator_writes(tmp_path: Path) -> None:
    files = write_phantoms(tmp_path)
    assert sum(f.stat().st_size for f in files) < 7.5e6
    data = Path(__file__).parents[1] / "data"
    if not all((data / domain).is_dir() for domain in SHAPES):
        pytest.skip("data/ is not there: dvc pull")
    for file in files:  # pixels, and not bytes, which depend on the version of the deflate library
        here, there = tifffile.imread(file), tifffile.imread(data / file.relative_to(tmp_path))
        assert here.shape == there.shape
        assert np.mean(here != there) < 1e-4  # processors differ in the last bit of a cosine


@pytest.mark.parametrize("domain", DOMAINS)
def test_labels_are_a_small_part_that_a_threshold_does_not_find(
    volumes: Volumes, domain: str
) -> None:
    image, label = volumes[domain]
    assert image.shape == label.shape == SHAPE[domain]
    assert image.dtype == label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1}
    assert 0.04 < label.mean() < 0.11
    assert np.mean((image == 0) | (image == 255)) < 0.02  # hardly anything is clipped
    best = 0.0
    for sigma in (1, 2, 4, 6, 8):
        blurred = ndimage.gaussian_filter(image.astype(float), (0, sigma, sigma))
        for cut in np.percentile(blurred, np.arange(2, 32, 2)):
            found = blurred < cut
            best = max(best, (found & (label == 1)).sum() / (found | (label == 1)).sum())
    assert best < 0.45
    assert image[label == 1].mean() < image[label == 0].mean() - 20  # but there is something to see


@pytest.mark.parametrize("domain", DOMAINS)
def test_organelles_are_inside_cells_and_apart_and_distractors_are_dark(
    volumes: Volumes, scenes: dict[str, Scene], domain: str
) -> None:
    (image, label), scene, rng = volumes[domain], scenes[domain], np.random.default_rng(0)
    for tube in scene.tubes:
        direction = rng.normal(size=(len(tube.radii), 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        surface = tube.centres + direction * tube.radii[:, None]
        border, cell = scene.membrane(surface)
        assert border.min() > 2
        assert len(set(cell) | set(scene.membrane(tube.centres)[1])) == 1
        assert all(other.sdf(surface)[0].min() > 0 for other in scene.tubes if other is not tube)
    kinds = {tube.kind for tube in scene.tubes}
    assert {"mitochondrion", "dense", "multivesicular"} <= kinds
    assert (scene.vesicles[:, 4] == 1).any()  # dense cores
    points = np.argwhere(np.ones_like(label)) * DOMAINS[domain].voxel_nm
    inside = np.zeros(label.size, bool)
    for tube in scene.tubes:
        if tube.kind == "dense":
            inside |= tube.sdf(points)[0] < -15  # further inside than sections shift
    dense = inside.reshape(label.shape)
    assert dense.sum() > 50
    assert not label[dense].any()
    blurred = ndimage.gaussian_filter(image.astype(float), (0, 2, 2))
    assert blurred[dense].mean() < blurred[label == 1].mean() + 15


def test_label_is_the_inside_of_the_mitochondria(
    volumes: Volumes, scenes: dict[str, Scene]
) -> None:
    _, label = volumes["phantom_fib"]  # its sections shift by a fraction of a voxel only
    points = np.argwhere(np.ones_like(label)) * DOMAINS["phantom_fib"].voxel_nm
    tubes = [t for t in scenes["phantom_fib"].tubes if t.kind == "mitochondrion"]
    inside = np.min([tube.sdf(points)[0] for tube in tubes], axis=0)
    surely = np.abs(inside) > 5.0  # nm; a voxel
    assert np.array_equal(label.ravel()[surely] == 1, inside[surely] < 0)


def test_domains_differ_as_fib_sem_and_tem_do(volumes: Volumes) -> None:
    """Neighbouring slices are copies at 5 nm and not at 50 nm; contrast and noise differ."""
    alike, overlap, histograms = [], [], []
    for image, label in volumes.values():
        pairs = itertools.pairwise(image)
        alike.append(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]))
        a, b = label[:-1] == 1, label[1:] == 1
        overlap.append((a & b).sum() / (a | b).sum())
        histograms.append(np.histogram(image, bins=32, range=(0, 256))[0] / image.size)
    assert alike[0] > 0.75  # measured on the real volumes: 0.89 and 0.35
    assert alike[1] < 0.45
    assert overlap[0] > 0.85
    assert overlap[1] < 0.75
    assert 0.5 * np.abs(histograms[0] - histograms[1]).sum() > 0.1  # total variation
    assert volumes["phantom_tem"][0].std() > 1.15 * volumes["phantom_fib"][0].std()


@pytest.mark.parametrize("domain", ORGANELLES)
def test_phantoms_of_organelles_have_all_of_them_inside_neurites(domain: str) -> None:
    image, label = make_volume(domain, (6, 192, 192), 1)
    share = {name: (label == value).mean() for name, value in CLASSES.items()}
    assert set(np.unique(label)) <= {0, *CLASSES.values()}
    for name, least in (("mitochondria", 0.01), ("er", 0.005), ("lipid_droplets", 0.002)):
        assert share[name] > least
    assert 0.4 < sum(share.values()) < 0.95
    droplet, rest = image[label == CLASSES["lipid_droplets"]], image[label == CLASSES["neurites"]]
    assert abs(droplet.mean() - rest.mean()) > 25


def test_waves_on_a_plane_equal_waves_at_points() -> None:
    waves = Waves.draw(np.random.default_rng(0), (100, 300), 2.0, 3)
    y, x = np.arange(6) * 4.6, np.arange(9) * 5.0
    grid: Any = np.broadcast_arrays(17.0, *np.meshgrid(y, x, indexing="ij"))
    points = np.stack(grid, axis=-1).reshape(-1, 3)
    np.testing.assert_allclose(waves.plane(17.0, y, x), waves(points), atol=1e-12)
    far = np.random.default_rng(1).uniform(0, 1e5, (20_000, 3))
    np.testing.assert_allclose(waves(far).std(axis=0), 2.0, rtol=0.05)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 33, 47)])
def test_tiny_volumes(shape: tuple[int, int, int]) -> None:
    for domain in DOMAINS:
        image, label = make_volume(domain, shape, 0)
        assert image.shape == label.shape == shape


def test_an_option_in_place_of_the_folder_makes_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "emadapt.data.phantom", "--help"]
    call = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert call.returncode == 1
    assert "usage: python -m emadapt.data.phantom OUT" in call.stderr
    assert not list(tmp_path.iterdir())
