"""Blocks through a model in 3D against the whole volume at once, as `evaluate` predicts it, and `emadapt segment` with one."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner

from emadapt import api
from emadapt.cli import main
from emadapt.data.align import AS_IT_IS, METHODS, Statistics
from emadapt.data.tiles import geometry
from emadapt.errors import InputError
from emadapt.models.predict3d import predict_block
from emadapt.models.segmenter import Segmenter, build_segmenter, load_segmenter
from emadapt.segment import job, partial, run
from emadapt.segment.job import Block, Order
from emadapt.segment.model import open_model
from emadapt.segment.onnx_graph import check_exportable
from emadapt.segment.preview import regime_to_tune
from emadapt.segment.rows3d import predict_rows_3d, reach_of
from emadapt.segment.run import segment_volume
from emadapt.study.study import BackboneSettings, RegimeSettings
from emadapt.volumes import write_zarr
from tiny import blobs, write_model

IMAGE, _ = blobs((13, 90, 60), 2)
KIND = RegimeSettings("resunet3d", patch=(4, 32, 32), channels=(2, 2, 2, 2, 2))
VOXEL = (30.0, 5.0, 5.0)


def a_segmenter(**change: float) -> Segmenter:
    """With an answer that differs from place to place."""
    spec = BackboneSettings(
        "tiny_dinov2",
        "random",
        **{"tile": 32, "overlap": 0.5, "views": 0, "precision": "fp32", **change},
    )  # type: ignore[arg-type]
    segmenter = build_segmenter(spec, KIND, "resunet3d", 0)
    lively(segmenter)
    return segmenter.eval()


def lively(segmenter: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            segmenter(torch.rand(2, 1, 4, 32, 32), (32, 32))  # running statistics of its own
        segmenter.head.after.conv.weight.mul_(10)  # type: ignore[union-attr, operator]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    folder = write_model(
        tmp_path_factory.mktemp("model") / "m", regime=KIND, head="resunet3d", tile=32, overlap=0.5
    )
    segmenter, _ = load_segmenter(folder)
    lively(segmenter.train())
    save_file(segmenter.trained_state(), folder / "model.safetensors")
    return folder


@pytest.fixture
def order(tmp_path: Path, model: Path) -> Order:
    tifffile.imwrite(tmp_path / "in.tif", IMAGE, photometric="minisblack")
    return Order(str(tmp_path / "in.tif"), str(tmp_path / "out.tif"), str(model), voxel_nm=VOXEL)


@pytest.mark.parametrize(
    "change",
    [{}, {"overlap": 0.2}, {"scale": 0.5}, pytest.param({"scale": 1.3}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("flips", [False, True])
def test_blocks_are_cut_from_one_volume(change: dict, flips: bool) -> None:
    segmenter = a_segmenter(**change)
    expected = np.stack([p for _, p in predict_block(segmenter, IMAGE, range(13), flips=flips)])
    geo = geometry((90, 60), segmenter.spec, segmenter.backbone.arch.patch)
    if geo.resized != geo.native:  # Pillow may resize y first and round in between, by a grey value
        plain, everything = expected, Block(0, 13, 0, 90)
        whole = predict_rows_3d(
            segmenter, lambda z, a, b: IMAGE[z, a:b], geo, everything, 13, flips
        )
        expected = np.stack([p for _, p in whole])
        assert np.abs(expected - plain).mean() < 3e-3
    for z0, z1, y0, y1 in [(0, 13, 0, 90), (0, 1, 0, 90), (5, 9, 31, 64), (12, 13, 89, 90)]:
        block = Block(z0, z1, y0, y1)
        asked: list[tuple[int, int, int]] = []

        def read(z: int, a: int, b: int, asked: list = asked) -> np.ndarray:
            asked.append((z, a, b))
            return IMAGE[z, a:b]

        got = dict(predict_rows_3d(segmenter, read, geo, block, 13, flips))
        assert list(got) == list(range(z0, z1))
        np.testing.assert_allclose(np.stack(list(got.values())), expected[z0:z1, y0:y1], atol=1e-5)
        reach = reach_of(segmenter, geo, block, 13)
        assert {z for z, _, _ in asked} == set(range(*reach.slices))
        assert (min(a for _, a, _ in asked), max(b for *_, b in asked)) == reach.rows
        assert (
            reach.slices[1] - reach.slices[0] <= z1 - z0 + 2 * 4
        )  # a patch more at most on either side
    assert expected.std() > 0.02


def test_whole_slices_have_the_same_bytes_however_they_are_cut_along_z() -> None:
    segmenter = a_segmenter()
    geo = geometry((90, 60), segmenter.spec, segmenter.backbone.arch.patch)

    def cut(*ends: int) -> np.ndarray:
        blocks = [Block(a, b, 0, 90) for a, b in itertools.pairwise(ends)]
        return np.stack(
            [
                p
                for block in blocks
                for _, p in predict_rows_3d(
                    segmenter, lambda z, a, b: IMAGE[z, a:b], geo, block, 13
                )
            ]
        )

    np.testing.assert_array_equal(cut(0, 13), cut(0, 1, 5, 6, 13))
    np.testing.assert_array_equal(
        cut(0, 13), np.stack([p for _, p in predict_block(segmenter, IMAGE, range(13))])
    )


def test_a_volume_thinner_than_the_patch_is_reflected() -> None:
    segmenter = a_segmenter()
    geo = geometry((90, 60), segmenter.spec, segmenter.backbone.arch.patch)
    for n in (1, 2, 3):
        got = dict(
            predict_rows_3d(segmenter, lambda z, a, b: IMAGE[z, a:b], geo, Block(0, n, 0, 90), n)
        )
        expected = dict(predict_block(segmenter, IMAGE, range(n)))
        assert list(got) == list(expected) == list(range(n))
        np.testing.assert_array_equal(
            np.stack(list(got.values())), np.stack(list(expected.values()))
        )


def test_segment_writes_what_evaluate_predicts_whatever_the_blocks(
    order: Order, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, _ = load_segmenter(model)
    expected = np.stack([p for _, p in predict_block(segmenter, IMAGE, range(13))])
    folder = Path(order.output).parent
    order = dataclasses.replace(order, probabilities=True, instances=True, overwrite=True)
    for rows in (90, 16):
        if rows < 90:
            for module in (job, write_zarr):
                monkeypatch.setattr(module, "CHUNK", 16)
            monkeypatch.setattr(job, "BLOCK_3D", 4 * 60 * 8)
        monkeypatch.setattr(job, "WINDOWS", 2)
        settled = job.prepare(order)
        assert settled.rows < 90 if rows < 90 else (settled.depth, settled.rows) == (4, 90)
        assert len(settled.blocks()) > 3
        segment_volume(order)
        found = tifffile.imread(folder / "out-probabilities.tif")
        assert np.abs(found - expected * 255).max() < 0.51
        clear = np.abs(expected - 0.5) > 1e-5
        np.testing.assert_array_equal(
            tifffile.imread(order.output)[clear], np.where(expected > 0.5, 255, 0)[clear]
        )
        assert (tifffile.imread(folder / "out-instances.tif") > 0).sum() == (
            tifffile.imread(order.output) > 0
        ).sum()
    assert 0.02 < (expected > 0.5).mean() < 0.98


def test_the_python_functions_give_the_same(order: Order, model: Path) -> None:
    segmenter, _ = load_segmenter(model)
    expected = np.stack([p for _, p in predict_block(segmenter, IMAGE, range(13))])
    loaded = api.load_model(model)
    np.testing.assert_array_equal(api.segment(IMAGE, loaded, VOXEL, probabilities=True), expected)
    assert [z for z, _ in api.segment_slices(IMAGE, loaded, VOXEL)] == list(range(13))


def test_slices_are_aligned_by_the_statistics_of_the_volume(tmp_path: Path, order: Order) -> None:
    reference = Statistics("", [30, 5, 5], [1] * 256)
    folder = write_model(
        tmp_path / "aligned",
        regime=KIND,
        head="resunet3d",
        tile=32,
        overlap=0.5,
        align="histogram",
        reference="a",
        facts={"align": {"reference": dataclasses.asdict(reference)}},
    )
    segmenter, _ = load_segmenter(folder)
    settled = job.prepare(dataclasses.replace(order, model=str(folder)))
    assert settled.statistics is not None
    own = Statistics(**settled.statistics)
    expected = np.stack(
        [
            p
            for _, p in predict_block(
                segmenter, IMAGE, range(13), aligner=METHODS["histogram"](own, reference)
            )
        ]
    )
    plain = np.stack([p for _, p in predict_block(segmenter, IMAGE, range(13), aligner=AS_IT_IS)])
    got = api.segment(IMAGE, api.load_model(folder), VOXEL, probabilities=True)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got - plain).max() > 1e-4


def test_preview_and_export(order: Order, model: Path) -> None:
    page = str(Path(order.output).with_suffix(".html"))
    found = CliRunner().invoke(
        main, ["preview", order.input, page, "--model", str(model), "--voxel-nm", "90", "5", "5"]
    )
    assert found.exit_code == 0, found.output
    assert "slices 90 nm apart, in training 30 nm (a)" in found.output
    assert Path(page).read_text().count("data:image/png") == 9
    opened = open_model(model)
    assert (
        regime_to_tune(opened) == "kind: resunet3d, patch: [4, 32, 32], channels: [2, 2, 2, 2, 2]"
    )
    flat = write_model(
        Path(order.output).parent / "flat", regime=RegimeSettings("unet2d"), head="unet2d"
    )
    assert regime_to_tune(open_model(flat)) == "kind: unet2d"
    for regime, said in (
        (RegimeSettings("full"), "kind: full, head: pyramid"),
        (RegimeSettings("knn"), ""),
        (RegimeSettings("frozen"), "kind: lora, rank: 16, alpha: 32.0, head: pyramid"),
        (RegimeSettings("frozen", align="norm"), ""),
    ):
        other: Any = SimpleNamespace(segmenter=SimpleNamespace(regime=regime, head_name="pyramid"))
        assert regime_to_tune(other) == said
    with pytest.raises(InputError, match=r"resunet3d, which sees neighbouring slices together"):
        check_exportable(opened)


def test_slices_of_another_shape_than_the_whole_ones_of_training_get_windows_that_overlap(
    tmp_path: Path,
) -> None:
    folder = write_model(
        tmp_path / "whole", regime=KIND, head="resunet3d", tile=0, overlap=0.0, scale=0.5
    )
    model, source = open_model(folder), api.array_source(IMAGE, VOXEL)
    geo = job.runner_for(job.settle(Order("array", "", ""), source, model), source, model).geo
    assert (geo.tile, geo.overlap) == ((48, 48), BackboneSettings.overlap)
    own = dataclasses.replace(model.segmenter.spec, tile=48, overlap=BackboneSettings.overlap)
    segmenter, _ = load_segmenter(folder)
    segmenter.spec = own
    expected = np.stack([p for _, p in predict_block(segmenter, IMAGE, range(13))])
    np.testing.assert_allclose(
        api.segment(IMAGE, model, VOXEL, probabilities=True), expected, atol=3e-3
    )


def test_stopped_and_repeated_it_gives_the_same_smoothed_along_z(
    order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(
        tmp_path / "smooth", regime=KIND, head="resunet3d", tile=32, overlap=0.5, smooth_z_nm=30.0
    )
    order = dataclasses.replace(order, model=str(folder), probabilities=True)
    undisturbed = dataclasses.replace(order, output=str(tmp_path / "undisturbed.tif"))
    segment_volume(undisturbed)
    monkeypatch.setattr(job, "WINDOWS", 1)
    segment_block = partial.segment_block
    done: list[None] = []

    def stop(*given: Any, **named: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        segment_block(*given, **named)
        done.append(None)

    monkeypatch.setattr(run, "segment_block", stop)
    with pytest.raises(KeyboardInterrupt):
        segment_volume(order)
    monkeypatch.setattr(run, "segment_block", segment_block)
    assert len(list((tmp_path / "out.tif.partial/done").iterdir())) == 2
    segment_volume(order)
    assert (tmp_path / "out-probabilities.tif").read_bytes() == (
        tmp_path / "undisturbed-probabilities.tif"
    ).read_bytes()
