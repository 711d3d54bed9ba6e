"""`emadapt segment` as a whole, on a tiny model with random weights."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from scipy.ndimage import label

from emadapt import api
from emadapt.cli import main
from emadapt.data.ingest import Volume
from emadapt.errors import InputError
from emadapt.models.predict import predict_slice, predict_slices
from emadapt.models.segmenter import load_segmenter
from emadapt.segment import job, partial, run
from emadapt.segment.job import Order
from emadapt.segment.partial import held
from emadapt.segment.run import segment_volume
from emadapt.volumes import write_tiff, write_zarr
from tiny import blobs, write_model

VOXEL = (30.0, 5.0, 5.0)
IMAGE, _ = blobs((7, 90, 60), 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def order(tmp_path: Path, model: Path) -> Order:
    tifffile.imwrite(tmp_path / "in.tif", IMAGE, photometric="minisblack")
    return Order(str(tmp_path / "in.tif"), str(tmp_path / "out.tif"), str(model), voxel_nm=VOXEL)


@pytest.fixture(scope="module")
def probability(model: Path) -> np.ndarray:
    """Slice by slice, as `evaluate` predicts."""
    segmenter, _ = load_segmenter(model)
    return np.stack([predict_slice(segmenter, image) for image in IMAGE])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices larger than a block, cut into parts."""
    blocks(monkeypatch, block=1000, chunk=16)


def blocks(
    monkeypatch: pytest.MonkeyPatch,
    block: int = 2**25,
    chunk: int = 512,
    depth: int = 16,
    tile_rows: int = 8,
) -> None:
    for module in (job, write_tiff, write_zarr):
        monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(job, "BLOCK", block)
    monkeypatch.setattr(job, "DEPTH", depth)
    monkeypatch.setattr(job, "TILE_ROWS", tile_rows)


def outputs(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_blocks_leave_no_trace(
    order: Order, probability: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = dataclasses.replace(order, probabilities=True, instances=True)
    folder = Path(order.output).parent
    results = []
    sizes: dict[str, int]
    for sizes in ({}, {"depth": 3}, {"block": 1000, "chunk": 32, "tile_rows": 0}):
        blocks(monkeypatch, **sizes)
        segment_volume(dataclasses.replace(order, overwrite=True))
        results.append({k: v for k, v in outputs(folder).items() if k.startswith("out")})
    assert sorted(results[0]) == [
        "out-instances.csv",
        "out-instances.tif",
        "out-probabilities.tif",
        "out.tif",
    ]
    assert results[0] == results[1] == results[2]
    assert not any(
        str(folder).encode() in content for content in results[0].values()
    )  # who shares a mask shares no path
    mask = tifffile.imread(order.output)
    np.testing.assert_array_equal(mask, np.where(probability > 0.5, 255, 0))
    assert 0.05 < (mask > 0).mean() < 0.95
    np.testing.assert_array_equal(
        tifffile.imread(folder / "out-probabilities.tif"), np.rint(probability * 255)
    )
    np.testing.assert_array_equal(tifffile.imread(folder / "out-instances.tif") > 0, mask > 0)
    assert tifffile.imread(folder / "out-instances.tif").max() == label(mask)[1]
    assert not (folder / "out.tif.partial").exists()


def test_smoothed_along_z_as_evaluate_smooths(
    order: Order, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "smooth", smooth_z_nm=30.0)
    order = dataclasses.replace(order, model=str(model), probabilities=True)
    volume = Volume(
        "v",
        IMAGE,
        IMAGE,
        {"split": {"train": [], "val": [], "test": []}, "md5": "", "voxel_nm": [30, 5, 5]},
    )
    expected = np.stack(
        [p for _, p in predict_slices(load_segmenter(model)[0], volume, list(range(7)))]
    )
    alone = np.stack([predict_slice(load_segmenter(model)[0], image) for image in IMAGE])
    assert np.abs(alone - expected).max() > 0.05
    results = []
    sizes: dict[str, int]
    for sizes in ({}, {"depth": 2}):
        blocks(monkeypatch, **sizes)
        segment_volume(dataclasses.replace(order, overwrite=True))
        results.append(
            (Path(order.output).read_bytes(), (tmp_path / "out-probabilities.tif").read_bytes())
        )
    assert results[0] == results[1]
    clear = (
        np.abs(expected - 0.5) > 1e-4
    )  # probabilities wait for their neighbours in steps of 1 / 65535
    np.testing.assert_array_equal(
        tifffile.imread(order.output)[clear], np.where(expected > 0.5, 255, 0)[clear]
    )
    model_ = api.load_model(model)
    np.testing.assert_array_equal(api.segment(IMAGE, model_, VOXEL, probabilities=True), expected)


def test_parts_of_slices_are_blocks(order: Order, small: None) -> None:
    settled = job.prepare(order)
    assert (settled.depth, settled.rows) == (1, 90)  # eight rows of tiles are more than the slice
    job.TILE_ROWS = 1
    settled = job.prepare(order)
    assert (settled.depth, settled.rows) == (1, 64)
    assert [(b.z0, b.y0, b.y1) for b in settled.blocks()[:3]] == [
        (0, 0, 64),
        (0, 64, 90),
        (1, 0, 64),
    ]


def test_zarr_holds_what_tiff_holds(
    order: Order, probability: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks(monkeypatch, chunk=32, depth=2)
    output = Path(order.output).with_name("out.ome.zarr")
    segment_volume(dataclasses.replace(order, output=str(output)))
    np.testing.assert_array_equal(
        zarr.open_array(output / "0", mode="r")[:], np.where(probability > 0.5, 255, 0)
    )
    about = zarr.open_group(output, mode="r").attrs["emadapt"]
    assert about["unit"] == "t-frozen-a-0"  # type: ignore[index, call-overload]
    assert about["window"] == [0.0, 255.0]  # type: ignore[index, call-overload]
    assert about["input"] == "in.tif"  # type: ignore[index, call-overload]
    assert not any(str(output.parent).encode() in content for content in outputs(output).values())


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_a_stopped_run_goes_on(order: Order, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within phases, between them and while outputs are made: the rest alone is done, and gives the same bytes."""
    blocks(monkeypatch, depth=2)
    order = dataclasses.replace(
        order, output=str(Path(order.output).with_suffix(suffix)), instances=True
    )
    folder = Path(order.output).parent
    segment_volume(order)
    expected = {k: v for k, v in outputs(folder).items() if k.startswith("out")}
    order = dataclasses.replace(order, overwrite=True)
    done: list[tuple[str, int]] = []
    stops = [("mask", 2), ("components", 1), ("instances", 0), ("finish", 1), ("publish", 0)]

    def stopping(phase: str, number: int) -> Any:
        if (phase, number) in stops:
            stops.remove((phase, number))
            raise KeyboardInterrupt
        done.append((phase, number))

    for phase, function in list(partial.PHASES.items()):

        def wrapped(
            p: Any, n: int, loaded: Any = None, *, phase: str = phase, function: Any = function
        ) -> None:
            stopping(phase, n)
            function(p, n)

        monkeypatch.setitem(partial.PHASES, phase, wrapped)
        if phase == "mask":
            monkeypatch.setattr(run, "segment_block", wrapped)
    calls = iter(range(100))
    finish, rename = run.finish, run.publish
    monkeypatch.setattr(run, "finish", lambda *a: stopping("finish", next(calls)) or finish(*a))
    monkeypatch.setattr(run, "publish", lambda *a: stopping("publish", 0) or rename(*a))
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            segment_volume(order)
    segment_volume(order)
    assert not stops
    for phase in ("mask", "components", "instances"):
        assert [n for p, n in done if p == phase] == [0, 1, 2, 3]
    assert {k: v for k, v in outputs(folder).items() if k.startswith("out")} == expected


@pytest.mark.slow
def test_a_killed_process_loses_what_it_was_at(order: Order, tmp_path: Path) -> None:
    image = np.tile(IMAGE, (6, 1, 3))
    tifffile.imwrite(order.input, image, photometric="minisblack")
    command = [
        sys.executable,
        "-m",
        "emadapt",
        "segment",
        order.input,
        "--model",
        order.model,
        "--voxel-nm",
        "30",
        "5",
        "5",
    ]
    limits = "import sys; from emadapt.segment import job; job.DEPTH = 1; sys.argv.pop(0); from emadapt.cli import main; main()"
    command[1:3] = ["-c", limits, "emadapt"]
    subprocess.run([*command, "whole.tif"], cwd=tmp_path, check=True)
    process = subprocess.Popen([*command, "killed.tif"], cwd=tmp_path)
    marks = tmp_path / "killed.tif.partial/done"
    while len(list(marks.glob("*.json")) if marks.is_dir() else []) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in marks.glob("*.json")}
    assert 3 <= len(kept) < 42
    assert not (tmp_path / "killed.tif").exists()
    first = {**kept}
    done = subprocess.run(
        [*command, "killed.tif"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "42/42" in done.stdout
    assert first == kept
    assert (tmp_path / "killed.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def refused(order: Order) -> str:
    with pytest.raises(InputError) as error:
        segment_volume(order)
    return str(error.value)


def test_what_is_made_is_published_from_another_folder_too(
    order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = run.publish
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    near = dataclasses.replace(order, input="in.tif", output="out.tif")
    with pytest.raises(KeyboardInterrupt):
        segment_volume(near)
    monkeypatch.setattr(run, "publish", rename)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    segment_volume(dataclasses.replace(order, input="../in.tif", output="../out.tif"))
    assert tifffile.imread(tmp_path / "out.tif").shape == IMAGE.shape
    with pytest.raises(InputError, match="what was made"):
        rename({tmp_path / "gone": tmp_path / "nowhere"}, tmp_path / "aside")


def test_nothing_is_overwritten_unasked(order: Order) -> None:
    Path(order.output).write_text("precious")
    assert "--overwrite" in refused(order)
    assert Path(order.output).read_text() == "precious"
    Path(order.output).unlink()
    table = Path(order.output).with_name("out-instances.csv")
    table.write_text("precious")
    assert "out-instances.csv" in refused(dataclasses.replace(order, instances=True))
    assert not Path(f"{order.output}.partial").exists()
    assert "the input itself" in refused(
        dataclasses.replace(order, output=order.input, overwrite=True)
    )
    volume = Path(order.output).with_name("v.zarr")
    (volume / "raw").mkdir(parents=True)
    inside = dataclasses.replace(
        order, input=str(volume / "raw"), output=str(volume), overwrite=True
    )
    assert "a part of it" in refused(inside)
    assert (volume / "raw").is_dir()
    segment_volume(dataclasses.replace(order, instances=True, overwrite=True))
    assert table.read_text().startswith("id,voxels")


def test_targets_that_cannot_be_written(order: Order, tmp_path: Path) -> None:
    assert "unknown kind" in refused(dataclasses.replace(order, output=str(tmp_path / "out.png")))
    assert "can be written to" in refused(
        dataclasses.replace(order, output=str(tmp_path / "missing/out.tif"))
    )
    assert "can be written to" in refused(
        dataclasses.replace(order, output=order.input + "/out.tif")
    )
    assert "no folder can be made" in refused(
        dataclasses.replace(order, output="/proc/out.tif")
    )  # also for root
    with held(tmp_path / "out.tif.partial"):
        assert "under way" in refused(order)


def test_a_full_disk_keeps_what_is_done(
    order: Order, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocks(monkeypatch, depth=2)
    mark = partial.Partial.mark

    def full(self: Any, phase: str, number: int, facts: dict[str, Any]) -> None:
        if number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "mask/0/2.0.0")
        mark(self, phase, number, facts)

    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "mark", full)
        message = refused(order)
    assert "full disk" in message
    assert "after the 2 blocks that are done" in message
    assert not Path(order.output).exists()
    segment_volume(order)
    assert tifffile.imread(order.output).shape == IMAGE.shape


def test_another_order_does_not_go_on_with_what_is_there(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks(monkeypatch, depth=2)
    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            segment_volume(order)
    other = dataclasses.replace(order, threshold=0.3)
    assert "another threshold" in refused(other)
    tifffile.imwrite(order.input, 255 - IMAGE, photometric="minisblack")
    assert "another stamp" in refused(order)
    segment_volume(dataclasses.replace(other, overwrite=True))
    assert (tifffile.imread(order.output) > 0).any()


def test_what_was_made_for_another_order_is_not_published(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            segment_volume(order)
    assert "another threshold" in refused(dataclasses.replace(order, threshold=1.0))
    segment_volume(dataclasses.replace(order, threshold=1.0, overwrite=True))
    assert not tifffile.imread(order.output).any()


def test_a_damaged_part_stops_the_run_and_what_is_done_is_kept(
    order: Order, tmp_path: Path
) -> None:
    path = tmp_path / "in.zarr"
    zarr.create_array(path, data=IMAGE, chunks=(2, 90, 60), zarr_format=2)
    (path / "2.0.0").write_bytes(b"no chunk")
    damaged = dataclasses.replace(
        order, input=str(path), window=(0.0, 255.0), output=str(tmp_path / "d.tif")
    )
    assert "cannot be decoded" in refused(damaged)
    assert (
        len(list((tmp_path / "d.tif.partial/done").glob("*.json"))) == 0
    )  # one block holds all seven slices
    good = tmp_path / "good.zarr"
    zarr.create_array(good, data=IMAGE, chunks=(2, 90, 60), zarr_format=2)
    (path / "2.0.0").write_bytes((good / "2.0.0").read_bytes())
    segment_volume(damaged)
    segment_volume(order)
    np.testing.assert_array_equal(tifffile.imread(damaged.output), tifffile.imread(order.output))


def test_bad_values(order: Order, tmp_path: Path) -> None:
    image = IMAGE.astype(np.float32)
    image[4, 3, 2] = np.nan
    tifffile.imwrite(order.input, image, photometric="minisblack")
    assert "NaN" in refused(order)
    assert not Path(f"{order.output}.partial").exists()
    tifffile.imwrite(order.input, np.full((2, 80, 80), 7, np.uint16), photometric="minisblack")
    assert "constant" in refused(order)
    assert "lower before" in refused(dataclasses.replace(order, window=(5.0, 5.0)))


@pytest.mark.parametrize("shape", [(1, 9, 11), (2, 20, 100), (1, 70, 5)])
def test_volumes_smaller_than_a_tile(order: Order, shape: tuple[int, ...]) -> None:
    image = np.resize(IMAGE[0], shape)
    tifffile.imwrite(order.input, image, photometric="minisblack")
    segment_volume(order)
    mask = tifffile.imread(order.output)
    np.testing.assert_array_equal(mask.reshape(shape).shape, shape)


def test_the_command_line(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["segment", order.input, order.output, "--model", order.model]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "no voxel size" in result.output
    assert "30 x 5 x 5 (a)" in result.output
    result = CliRunner().invoke(
        main, [*words, "--voxel-nm", "30", "5", "5", "--threshold", "0.4", "--flips", "--instances"]
    )
    assert result.exit_code == 0, result.output
    assert "voxels" in result.output
    with tifffile.TiffFile(order.output) as tif:
        about = json.loads(tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Description"])  # type: ignore[arg-type]
    assert (about["threshold"], about["flips"]) == (0.4, True)
    monkeypatch.setattr(
        "emadapt.segment.run.segment_volume",
        lambda order: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 130
    assert "repeat the command" in result.output
