"""The phantoms are reproducible, look like their domains by the numbers, and are not solved by a threshold."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from emadapt.data.layouts import find_parts
from emadapt.data.phantom import SHAPES, make_volume, write_phantoms
from emadapt.data.phantom_domains import DOMAINS
from emadapt.data.phantom_scene import Waves, make_scene

SHAPE = {"phantom_fib": (10, 224, 224), "phantom_tem": (6, 224, 224)}
TINY = {name: {"train": (3, 48, 64), "test": (2, 48, 64)} for name in DOMAINS}


@pytest.fixture(scope="module")
def volumes():
    return {name: make_volume(name, SHAPE[name], seed=3) for name in DOMAINS}


@pytest.fixture(scope="module")
def scenes():
    return {name: make_scene(name, SHAPE[name], seed=3) for name in DOMAINS}


def _digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def _neighbour_correlation(image):
    return np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in itertools.pairwise(image)])


@pytest.mark.parametrize("domain", DOMAINS)
def test_shapes_and_values(volumes, domain):
    image, label = volumes[domain]
    assert image.shape == label.shape == SHAPE[domain]
    assert image.dtype == label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1}
    assert np.mean((image == 0) | (image == 255)) < 0.02  # hardly anything is clipped


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    return root, write_phantoms(root, seed=1, shapes=TINY)


def test_same_seed_same_bytes(written, tmp_path):
    root, files = written
    for run, seed in (("same", 1), ("other", 2)):
        write_phantoms(tmp_path / run, seed=seed, shapes=TINY)
    a, b, c = _digests(root), _digests(tmp_path / "same"), _digests(tmp_path / "other")
    assert a == b
    assert set(a) == {
        f"{d}/{p}/{n}.tif" for d in DOMAINS for p in ("train", "test") for n in ("image", "label")
    }
    assert len(files) == len(a)
    assert not any(a[name] == c[name] for name in a if "image" in name)


@pytest.mark.parametrize("domain", DOMAINS)
def test_train_and_test_are_different_tissue(written, domain):
    a, b = (
        tifffile.imread(written[0] / domain / part / "image.tif")[0].ravel()
        for part in ("train", "test")
    )
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.4


def test_files_are_stacks_without_stamps_that_the_reader_takes(written):
    root, files = written
    for path in files:
        with tifffile.TiffFile(path) as tif:
            assert len(tif.pages) == (3 if "train" in path.parts else 2)
            assert not {"DateTime", "Software", "HostComputer"} & {
                tag.name for tag in tif.pages.first.tags
            }
    parts = find_parts(root / "phantom_fib", "stack", "number")
    assert {p.name: (p.depth, p.labels.shape[0]) for p in parts} == {
        "train": (3, 3),
        "test": (2, 2),
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_foreground_fraction(volumes, domain):
    assert 0.04 < volumes[domain][1].mean() < 0.11


@pytest.mark.parametrize("domain", DOMAINS)
def test_mitochondria_lie_inside_cells_and_apart_from_other_organelles(scenes, domain):
    scene, rng = scenes[domain], np.random.default_rng(0)
    for tube in scene.tubes:
        direction = rng.normal(size=(len(tube.radii), 3))
        surface = (
            tube.centres
            + direction / np.linalg.norm(direction, axis=1, keepdims=True) * tube.radii[:, None]
        )
        border, cell = scene.membrane(surface)
        assert border.min() > 2
        assert len(set(cell) | set(scene.membrane(tube.centres)[1])) == 1
        assert all(other.sdf(surface)[0].min() > 0 for other in scene.tubes if other is not tube)


def test_label_is_the_inside_of_the_mitochondria(volumes, scenes):
    _, label = volumes["phantom_fib"]  # its sections shift by a fraction of a voxel only
    points = np.argwhere(np.ones_like(label)) * DOMAINS["phantom_fib"].voxel_nm
    inside = np.full(len(points), np.inf)
    for tube in scenes["phantom_fib"].tubes:
        if tube.kind == "mitochondrion":
            inside = np.minimum(inside, tube.sdf(points)[0])
    surely = np.abs(inside) > 5.0  # nm; a voxel
    assert np.array_equal(label.ravel()[surely] == 1, inside[surely] < 0)


def test_neighbouring_slices_are_copies_at_5_nm_and_not_at_50_nm(volumes):
    fib, tem = (_neighbour_correlation(volumes[d][0]) for d in ("phantom_fib", "phantom_tem"))
    assert fib > 0.75  # measured on the real volumes: 0.89 and 0.35
    assert tem < 0.45
    overlap = {}
    for domain, (_, label) in volumes.items():
        a, b = label[:-1] == 1, label[1:] == 1
        overlap[domain] = (a & b).sum() / (a | b).sum()
    assert overlap["phantom_fib"] > 0.85
    assert overlap["phantom_tem"] < 0.75


def test_domains_differ_in_their_histograms_and_noise(volumes):
    histograms = [
        np.histogram(volumes[d][0], bins=32, range=(0, 256))[0] / volumes[d][0].size
        for d in DOMAINS
    ]
    assert 0.5 * np.abs(histograms[0] - histograms[1]).sum() > 0.1  # total variation
    fib, tem = (volumes[d][0].std() for d in ("phantom_fib", "phantom_tem"))
    assert tem > 1.15 * fib


@pytest.mark.parametrize("domain", DOMAINS)
def test_distractors_are_dark_and_not_labelled(volumes, scenes, domain):
    (image, label), scene = volumes[domain], scenes[domain]
    dense = [t for t in scene.tubes if t.kind == "dense"]
    assert dense
    assert any(t.kind == "multivesicular" for t in scene.tubes)
    assert (scene.vesicles[:, 4] == 1).any()  # dense cores
    points = np.argwhere(np.ones_like(label)) * DOMAINS[domain].voxel_nm
    inside = np.zeros(label.shape, bool)
    for tube in dense:
        inside |= (tube.sdf(points)[0] < -15).reshape(
            label.shape
        )  # further inside than sections shift
    assert inside.sum() > 50
    assert not label[inside].any()
    blurred = ndimage.gaussian_filter(image.astype(float), (0, 2, 2))
    assert blurred[inside].mean() < blurred[label == 1].mean() + 15


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_threshold_does_not_segment_it(volumes, domain):
    image, label = volumes[domain]
    best = 0.0
    for sigma in (1, 2, 4, 6, 8):
        blurred = ndimage.gaussian_filter(image.astype(float), (0, sigma, sigma))
        for cut in np.percentile(blurred, np.arange(2, 32, 2)):
            found = blurred < cut
            best = max(best, (found & (label == 1)).sum() / (found | (label == 1)).sum())
    assert best < 0.45
    assert image[label == 1].mean() < image[label == 0].mean() - 20  # but there is something to see


def test_waves_on_a_plane_equal_waves_at_points():
    waves = Waves.draw(np.random.default_rng(0), (100, 300), 2.0, 3)
    y, x = np.arange(6) * 4.6, np.arange(9) * 5.0
    points = np.stack(
        np.broadcast_arrays(17.0, *np.meshgrid(y, x, indexing="ij")), axis=-1
    ).reshape(-1, 3)
    np.testing.assert_allclose(waves.plane(17.0, y, x), waves(points), atol=1e-12)
    far = np.random.default_rng(1).uniform(0, 1e5, (20_000, 3))
    np.testing.assert_allclose(waves(far).std(axis=0), 2.0, rtol=0.05)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 33, 47)])
def test_tiny_volumes(domain, shape):
    image, label = make_volume(domain, shape, 0)
    assert image.shape == label.shape == shape


def test_embedded_data_stay_small():
    pixels = sum(np.prod(shape) for parts in SHAPES.values() for shape in parts.values())
    assert pixels < 7.5e6  # bytes of the images before compression; labels add a few percent


@pytest.mark.slow
def test_embedded_data_are_what_the_generator_writes(tmp_path):
    files = write_phantoms(tmp_path)
    assert sum(f.stat().st_size for f in files) < 7.5e6
    data = Path(__file__).parents[1] / "data"
    if not all((data / domain).is_dir() for domain in SHAPES):
        pytest.skip("data/ is not there: dvc pull")
    for file in files:  # pixels, and not bytes, which depend on the version of the deflate library
        here, there = tifffile.imread(file), tifffile.imread(data / file.relative_to(tmp_path))
        assert here.shape == there.shape
        assert (
            np.mean(here != there) < 1e-4
        )  # the last bit of a cosine may differ between processors


def test_an_option_in_place_of_the_folder_is_answered_and_makes_no_folder(tmp_path: Path) -> None:
    call = subprocess.run(
        [sys.executable, "-m", "emadapt.data.phantom", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert call.returncode == 1
    assert "usage: python -m emadapt.data.phantom OUT" in call.stderr
    assert not list(tmp_path.iterdir())
