"""Synthetic EM of random domains: a function of the seed, labelled where mitochondria are."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.data.ingest import ingest, open_volume
from emadapt.data.synthetic import DEPTH, draw_microscope, make_domain
from emadapt.data.synthetic_paint import paint
from emadapt.data.synthetic_recipes import RECIPES, draw_stain, draw_tissue
from emadapt.data.synthetic_tissue import Block, make_block
from emadapt.volumes.opening import open_source
from tiny import make_study, settings

SIDE = 48
EXTENT = np.array([100.0, 1500.0, 1500.0])


def block_of(number: int) -> Block:
    rng = np.random.default_rng([0, number])
    stain, tissue = draw_stain(rng), draw_tissue(number, rng)
    return make_block(tissue, stain, EXTENT, rng)


def test_same_seed_same_bytes() -> None:
    first, same, other = (make_domain(seed, 0, 1, 900) for seed in (0, 0, 1))
    assert first[2] == same[2] != other[2]
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], same[:2], strict=True))


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_labels_are_mitochondria_and_nothing_that_resembles_them(number: int) -> None:
    block, grid = block_of(number), np.arange(0, 1500, 15.0)
    canvas = paint(block, 50.0, grid, grid)
    points = canvas.points.reshape(-1, 3)
    for body in block.bodies:
        deep = (body.sdf(points)[0] < -0.3 * body.radii.max()).reshape(canvas.label.shape)
        assert (canvas.label[deep] == (body.kind == "mitochondrion")).all()
    outside = np.min([b.sdf(points)[0] for b in block.bodies if b.kind == "mitochondrion"], axis=0)
    assert not canvas.label.ravel()[outside > 60].any()


def test_domains_span_pixels_sections_and_greys() -> None:
    scopes = [draw_microscope(np.random.default_rng([1, n])) for n in range(300)]
    pixels, sections = ([getattr(s, name) for s in scopes] for name in ("pixel_nm", "section_nm"))
    assert 3 <= min(pixels) < 3.5
    assert 14 < max(pixels) <= 16
    assert 4 <= min(sections) < 5
    assert 55 < max(sections) <= 60
    matrix = np.array([draw_stain(np.random.default_rng([2, n])).matrix for n in range(300)])
    assert 0.1 < np.mean(matrix > 0) < 0.3  # paler than the cytosol


def test_a_dataset_of_domains_is_split_by_whole_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emadapt.data.synthetic.SIDE", SIDE)
    params = settings()
    params["datasets"]["b"] = {"layout": "synthetic", "voxel_nm": [30, 9, 9], "domains": 8}
    ingest(make_study(tmp_path, params, ingested=False), "b")
    volume = open_volume("b")
    assert volume.image.shape == (8 * DEPTH, SIDE, SIDE)
    assert set(np.unique(volume.label)) == {0, 1}
    domains = [{z // DEPTH for z in volume.split[part]} for part in ("train", "val", "test")]
    assert all(domains)
    assert sum(map(len, domains)) == len(set.union(*domains))
    assert volume.ends == list(range(0, 8 * DEPTH + 1, DEPTH))  # no slice has another's neighbours


def test_files_state_their_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emadapt.data.synthetic.WRITTEN", (2, 600.0))
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["synthesise", str(out), "--domains", "2", "--seed", "3"])
    assert done.exit_code == 0, done.output
    for number in range(2):
        image, label, voxel = make_domain(3, number, 2, 600.0)
        folder = out / f"{number:03d}"
        assert np.array_equal(tifffile.imread(folder / "label.tif"), label)
        source = open_source(str(folder / "image.tif"))
        assert np.array_equal(source.read(0, 2), image)
        assert source.voxel_nm == pytest.approx(voxel, rel=1e-4)
    again = CliRunner().invoke(main, ["synthesise", str(out)])
    assert (again.exit_code, "expected a new or an empty folder" in again.output) == (2, True)
