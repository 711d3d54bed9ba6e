"""`emadapt segment` as a whole, on tiny models with random weights in 2D and in 3D."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner

from emadapt import api
from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.segment import job, partial, run
from emadapt.segment.job import Order
from emadapt.segment.partial import held
from emadapt.segment.run import segment_volume
from emadapt.segment.runner import array_runner
from emadapt.volumes import write_tiff, write_zarr
from tiny import blobs, predicted, write_3d_model, write_model

VOXEL = (30.0, 5.0, 5.0)
IMAGE, _ = blobs((7, 90, 60), 2)
MODELS: dict[str, Any] = {
    "tiles": {},
    "neighbours": {"context": 1},
    "smoothed": {"smooth_z_nm": 30.0},
    "windows": {"overlap": 0.5},
}


def model_of(folder: Path, kind: str) -> Path:
    write = write_3d_model if kind == "windows" else write_model
    return write(folder, **MODELS[kind])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def order(tmp_path, model):
    tifffile.imwrite(tmp_path / "in.tif", IMAGE, photometric="minisblack")
    return Order(str(tmp_path / "in.tif"), str(tmp_path / "out.tif"), str(model), voxel_nm=VOXEL)


def blocks(
    monkeypatch: pytest.MonkeyPatch,
    block: int = 2**24,
    chunk: int = 512,
    depth: int = 16,
    tile_rows: int = 6,
) -> None:
    """Other sizes of blocks and chunks."""
    for module in (job, write_tiff, write_zarr):
        monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(job, "BLOCK", block)
    monkeypatch.setattr(job, "DEPTH", depth)
    monkeypatch.setattr(job, "TILE_ROWS", tile_rows)


def outputs(folder: Path) -> dict[str, bytes]:
    """The outputs in a folder, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if name.startswith("out")}


def refused(order: Order) -> str:
    with pytest.raises(InputError) as error:
        segment_volume(order)
    return str(error.value)


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_leave_no_trace_and_segment_predicts_what_evaluate_predicts(
    order, kind, tmp_path, monkeypatch
):
    folder = model_of(tmp_path / "model", kind)
    order = dataclasses.replace(
        order, model=str(folder), probabilities=True, instances=True, overwrite=True
    )
    expected = predicted(folder, IMAGE)
    sizes: list[dict[str, int]] = [
        {},
        {"depth": 2, "block": 4 * 90 * 60},
        {"block": 1000, "chunk": 32, "tile_rows": 1},
    ]
    results = []
    for number, size in enumerate(sizes):
        blocks(monkeypatch, **size)
        assert (len(job.prepare(order).blocks()) > 1) == bool(number)
        segment_volume(order)
        found = tifffile.imread(tmp_path / "out-probabilities.tif").astype(float)
        assert np.abs(found - expected * 255).max() < 0.52
        clear = np.abs(expected - 0.5) > 1e-4
        mask = tifffile.imread(order.output)
        np.testing.assert_array_equal(mask[clear], np.where(expected > 0.5, 255, 0)[clear])
        instances = tifffile.imread(tmp_path / "out-instances.tif")
        np.testing.assert_array_equal(instances > 0, mask > 0)
        results.append(outputs(tmp_path))
    names = ["out-instances.csv", "out-instances.tif", "out-probabilities.tif", "out.tif"]
    assert sorted(results[0]) == names  # and no folder of the run
    assert results[0] == results[1]
    assert 0.02 < (expected > 0.5).mean() < 0.98
    said = b"".join(results[0].values())
    assert str(tmp_path).encode() not in said  # who shares a mask shares no path
    opened = api.load_model(folder)
    probability = api.segment(IMAGE, opened, VOXEL, probabilities=True)
    np.testing.assert_allclose(probability, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["neighbours", "windows"])
def test_a_second_look_at_other_pixels_is_averaged_with_the_first(kind, tmp_path, monkeypatch):
    """Whatever the blocks are; a resampled grey value may be rounded another way in another one."""
    write = write_3d_model if kind == "windows" else write_model
    looks = []
    for pixel_nm in (6.0, 4.0):
        model = api.load_model(write(tmp_path / f"{pixel_nm}", **MODELS[kind], pixel_nm=pixel_nm))
        looks.append(api.segment(IMAGE, model, VOXEL, probabilities=True))
    assert np.abs(looks[0] - looks[1]).max() > 0.05
    folder = tmp_path / "6.0"
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, "second_pixel_nm": 4.0}))
    model = api.load_model(folder)
    both = api.segment(IMAGE, model, VOXEL, probabilities=True)
    np.testing.assert_allclose(both, np.mean(looks, axis=0), atol=1e-6)
    blocks(monkeypatch, block=1000, chunk=32, tile_rows=1)
    assert len(array_runner(IMAGE, model, VOXEL).job.blocks()) > 4
    parts = api.segment(IMAGE, model, VOXEL, probabilities=True)
    np.testing.assert_allclose(parts, both, atol=1e-2)
    fast = api.segment(IMAGE, model, VOXEL, probabilities=True, fast=True)
    np.testing.assert_allclose(fast, looks[0], atol=1e-2)


@pytest.mark.parametrize("shapes", [((8, 64, 64), (24, 64, 64)), ((1, 512, 64), (1, 1536, 64))])
@pytest.mark.parametrize("kind", ["tiles", "windows"])
def test_memory_grows_neither_with_the_slices_nor_with_their_rows(
    kind, shapes, tmp_path, monkeypatch
):
    blocks(monkeypatch, block=4 * 64 * 64, chunk=16, depth=4, tile_rows=1)
    model = api.load_model(model_of(tmp_path / "model", kind))
    peaks = []
    for shape in shapes:
        array = zarr.create_array({}, shape=shape, chunks=(8, 64, 64), dtype="u1")
        runner = array_runner(array, model, VOXEL)
        tracemalloc.start()
        for block in runner.job.blocks():
            for _ in runner.probability(block, runner.load(block)):
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # of three times the volume


def test_zarr_holds_what_tiff_holds(order, monkeypatch):
    blocks(monkeypatch, chunk=32, depth=2)
    output = Path(order.output).with_name("out.ome.zarr")
    segment_volume(order)
    segment_volume(dataclasses.replace(order, output=str(output)))
    found: Any = zarr.open_array(output / "0", mode="r")
    np.testing.assert_array_equal(found[:], tifffile.imread(order.output))
    about: Any = zarr.open_group(output, mode="r").attrs["emadapt"]
    assert (about["unit"], about["window"]) == ("t-frozen-a-0", [0.0, 255.0])
    assert about["input"] == "in.tif"


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_a_stopped_run_goes_on(order, suffix, tmp_path, monkeypatch):
    """Stopped in phases and while outputs are made: only the rest is done, with the same bytes."""
    blocks(monkeypatch, depth=2)
    folder = write_model(tmp_path / "smooth", smooth_z_nm=30.0)
    output = str(tmp_path / f"out{suffix}")
    order = dataclasses.replace(order, model=str(folder), output=output, instances=True)
    segment_volume(order)
    expected = outputs(tmp_path)
    order = dataclasses.replace(order, overwrite=True)
    stops = [("tiles", 1), ("mask", 2), ("components", 1), ("instances", 0), ("finish", 1)]
    done: list[tuple[str, int]] = []

    def stopping(phase: str, number: int) -> None:
        if (phase, number) in stops:
            stops.remove((phase, number))
            raise KeyboardInterrupt
        done.append((phase, number))

    mark, finish, calls = partial.Partial.mark, run.finish, iter(range(100))

    def marking(self: Any, phase: str, number: int, facts: dict[str, Any]) -> None:
        stopping(phase, number)
        mark(self, phase, number, facts)

    def finishing(*given: Any) -> Any:
        stopping("finish", next(calls))
        return finish(*given)

    monkeypatch.setattr(partial.Partial, "mark", marking)
    monkeypatch.setattr(run, "finish", finishing)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            segment_volume(order)
    segment_volume(order)
    assert not stops
    for phase in ("tiles", "mask", "components", "instances"):
        assert [n for p, n in done if p == phase] == [0, 1, 2, 3]
    assert outputs(tmp_path) == expected


def test_a_link_to_a_volume_is_segmented_under_its_own_name(order, tmp_path):
    Path(order.input).rename(tmp_path / "0f3a")  # as DVC's cache calls it
    Path(order.input).symlink_to(tmp_path / "0f3a")
    segment_volume(order)
    assert tifffile.imread(order.output).shape == IMAGE.shape


def test_nothing_is_overwritten_unasked(order, tmp_path):
    (tmp_path / "out.tif").write_text("precious")
    assert "--overwrite" in refused(order)
    assert (tmp_path / "out.tif").read_text() == "precious"
    (tmp_path / "out.tif").unlink()
    (tmp_path / "out-instances.csv").write_text("precious")
    assert "out-instances.csv" in refused(dataclasses.replace(order, instances=True))
    assert not (tmp_path / "out.tif.partial").exists()
    segment_volume(dataclasses.replace(order, instances=True, overwrite=True))
    assert (tmp_path / "out-instances.csv").read_text().startswith("id,voxels")


def test_what_we_did_not_write_is_never_removed(order, tmp_path):
    """Not even with --overwrite: a folder named as our partial results, one named as the output."""
    order = dataclasses.replace(order, overwrite=True)
    mine = tmp_path / "out.tif.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    assert "did not make" in refused(order)
    other = dataclasses.replace(order, output=str(tmp_path / "out.zarr"))
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr/thesis.txt").write_text("precious")
    assert "did not write" in refused(other)
    for place in (mine, tmp_path / "out.zarr"):
        assert [path.name for path in place.iterdir()] == ["thesis.txt"]
        (place / "thesis.txt").unlink()
        place.rmdir()
    segment_volume(other)
    segment_volume(other)  # replaces its own


def test_the_input_is_never_an_output(order, tmp_path):
    order = dataclasses.replace(order, overwrite=True)
    assert "the input itself" in refused(dataclasses.replace(order, output=order.input))
    raw = tmp_path / "v.zarr/raw"
    raw.mkdir(parents=True)
    around = dataclasses.replace(order, input=str(raw), output=str(raw.parent))
    assert "a part of it" in refused(around)
    assert raw.is_dir()


def test_targets_that_cannot_be_written(order: Order, tmp_path: Path) -> None:
    for output, said in (
        (tmp_path / "out.png", "unknown kind"),
        (tmp_path / "missing/out.tif", "can be written to"),
        (tmp_path / "in.tif/out.tif", "can be written to"),
    ):
        assert said in refused(dataclasses.replace(order, output=str(output)))
    with held(tmp_path / "out.tif.partial"):
        assert "still going" in refused(order)


@pytest.mark.parametrize("stopped_at", ["finish", "publish"])
def test_another_order_does_not_go_on_with_what_is_there(order, stopped_at, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, stopped_at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            segment_volume(order)
    other = dataclasses.replace(order, threshold=1.0)
    assert "another threshold" in refused(other)
    tifffile.imwrite(order.input, 255 - IMAGE, photometric="minisblack")
    assert "another content of the volume" in refused(order)
    segment_volume(dataclasses.replace(other, overwrite=True))
    assert not tifffile.imread(order.output).any()


def test_a_damaged_part_stops_the_run_and_what_is_done_is_kept(order, tmp_path, monkeypatch):
    blocks(monkeypatch, depth=2)
    path = tmp_path / "in.zarr"
    zarr.create_array(path, data=IMAGE, chunks=(2, 90, 60), zarr_format=2)
    good = (path / "2.0.0").read_bytes()
    (path / "2.0.0").write_bytes(b"no chunk")
    output = str(tmp_path / "d.tif")
    damaged = dataclasses.replace(order, input=str(path), window=(0.0, 255.0), output=output)
    assert "cannot be decoded" in refused(damaged)
    assert len(list((tmp_path / "d.tif.partial/done").glob("*.json"))) == 2
    (path / "2.0.0").write_bytes(good)
    segment_volume(damaged)
    segment_volume(order)
    np.testing.assert_array_equal(tifffile.imread(output), tifffile.imread(order.output))


def test_bad_values(order: Order) -> None:
    image = IMAGE.astype(np.float32)
    image[4, 3, 2] = np.nan
    tifffile.imwrite(order.input, image, photometric="minisblack")
    assert "NaN" in refused(order)
    assert not Path(f"{order.output}.partial").exists()
    tifffile.imwrite(order.input, np.full((2, 80, 80), 7, np.uint16), photometric="minisblack")
    assert "constant" in refused(order)
    assert "lower before" in refused(dataclasses.replace(order, window=(5.0, 5.0)))


@pytest.mark.parametrize("shape", [(1, 9, 11), (2, 20, 100), (1, 70, 5)])
@pytest.mark.parametrize("kind", ["tiles", "windows"])
def test_volumes_smaller_than_a_tile_or_a_window(order, shape, kind, tmp_path):
    folder = model_of(tmp_path / "model", kind)
    image = np.resize(IMAGE[0], shape)
    tifffile.imwrite(order.input, image, photometric="minisblack")
    segment_volume(dataclasses.replace(order, model=str(folder)))
    mask = tifffile.imread(order.output).reshape(shape)
    expected = predicted(folder, image)
    clear = np.abs(expected - 0.5) > 1e-4
    np.testing.assert_array_equal(mask[clear], np.where(expected > 0.5, 255, 0)[clear])


def test_the_command_line(order, monkeypatch):
    words = ["segment", order.input, order.output, "--model", order.model]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "30 x 5 x 5 nm (a)" in result.output  # the voxel size of training, as the file has none
    words += ["--voxel-nm", "30", "5", "5", "--threshold", "0.4", "--instances"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    with tifffile.TiffFile(order.output) as tif:
        assert json.loads((tif.imagej_metadata or {})["Info"])["threshold"] == 0.4
    monkeypatch.setattr("emadapt.segment.run.segment_volume", interrupt)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 130
    assert "repeat the command" in result.output
