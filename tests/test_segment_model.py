"""How a user's slices enter a model: voxel size, grey values, alignment, models of whole slices."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from emadapt.data.align import Statistics, statistics
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.data.tiles import geometry
from emadapt.errors import InputError
from emadapt.models.predict import predict_slices
from emadapt.segment import job as job_module
from emadapt.segment import runner as runner_module
from emadapt.segment.job import Job, Order, prepare
from emadapt.segment.model import open_model, zoom_for
from emadapt.segment.runner import Runner, open_runner
from emadapt.training.model_files import load_model
from emadapt.volumes.source import array_source
from tiny import blobs, make_study, predicted, write_model

IMAGE, LABEL = blobs((3, 90, 100), 4)
ORDER = Order("array", "", "m", voxel_nm=(30.0, 5.0, 5.0))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settle(monkeypatch: Any, image: np.ndarray, **change: Any) -> tuple[Job, Runner]:
    """A job on an array as if it were a file."""
    for module in (job_module, runner_module):
        monkeypatch.setattr(module, "open_image", lambda *_: array_source(image, None))
    settled = prepare(dataclasses.replace(ORDER, **change))
    return settled, open_runner(settled)


def segmented(runner: Runner) -> np.ndarray:
    return np.stack([probability for _, probability in runner.slices()])


def test_pixels_of_another_size_are_resampled_to_those_of_training(monkeypatch):
    write_model(Path("m"))
    settled, runner = settle(monkeypatch, IMAGE, voxel_nm=(30.0, 10.0, 2.5))
    assert (settled.dataset, settled.zoom) == ("a", (2.0, 0.5))
    small = np.asarray(Image.fromarray(IMAGE[1]).resize((50, 180), Image.Resampling.BICUBIC))
    expected = Image.fromarray(predicted(Path("m"), small[None])[0])
    back = expected.resize((100, 90), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(segmented(runner)[1], np.asarray(back), atol=0.02)


@pytest.mark.parametrize(
    ("voxel", "pixel_nm", "expected"),
    [
        ((50.0, 5.4, 5.4), 0.0, ("a", (1.0, 1.0))),  # nearly the same
        ((50.0, 5.6, 5.6), 0.0, ("a", (1.12, 1.12))),
        ((30.0, 15.0, 16.0), 0.0, ("coarse", (1.0, 1.0))),
        ((30.0, 2.5, 2.5), 0.0, ("a", (0.5, 0.5))),
        ((30.0, 5.1, 5.0), 5.0, ("a", (1.02, 1.0))),  # a model of harmonised pixels
    ],
)
def test_the_nearest_dataset_of_training_counts(voxel, pixel_nm, expected):
    sizes = {"a": [5, 5, 5], "coarse": [40, 16, 16]}
    model = open_model(write_model(Path("m"), facts={"voxel_nm": sizes}, pixel_nm=pixel_nm))
    assert zoom_for(model, voxel) == expected
    with pytest.raises(InputError, match="pixels of quite another size"):
        zoom_for(model, (30.0, 0.005, 0.005))  # micrometres


def test_grey_values_are_aligned_as_evaluate_aligns_them(monkeypatch):
    """A dataset without a split: all slices count, for evaluate and here."""
    manifest = {"split": {"train": [0, 1, 2], "val": [], "test": []}, "voxel_nm": [30, 5, 5]}
    volume = Volume("v", IMAGE, LABEL, {**manifest, "md5": "0" * 32})
    reference = Volume("a", 255 - IMAGE // 2, LABEL, {**manifest, "md5": "1" * 32})
    known = {"align": {"reference": dataclasses.asdict(statistics(reference))}}
    write_model(Path("m"), align="histogram", reference="a", facts=known)
    monkeypatch.setattr("emadapt.data.align.open_volume", lambda name: reference)
    segmenter, _ = load_model(Path("m"))
    expected = np.stack([p for _, p in predict_slices(segmenter, volume, [0, 1, 2])])
    settled, runner = settle(monkeypatch, IMAGE)
    np.testing.assert_allclose(segmented(runner), expected, atol=1e-6)
    assert isinstance(settled.statistics, dict)
    assert Statistics(**settled.statistics).histogram == statistics(volume).histogram


def test_grey_values_as_ingest_takes_them(tmp_path, monkeypatch):
    steps = np.arange(3, dtype=np.uint16)[:, None, None] * 50
    deep = (IMAGE.astype(np.uint16) * 200 + steps).repeat(4, 0)
    study = make_study(tmp_path, ingested=False)
    tifffile.imwrite(tmp_path / "data/a/image.tif", deep, photometric="minisblack")
    tifffile.imwrite(tmp_path / "data/a/label.tif", LABEL.repeat(4, 0), photometric="minisblack")
    ingest(study, "a", tmp_path / "data", tmp_path / "build/ingest")
    volume = open_volume("a", tmp_path / "build/ingest")
    train, facts = volume.split["train"], volume.manifest["intensity"]
    write_model(Path("m"))
    settled, runner = settle(monkeypatch, deep[train])
    assert settled.window == (facts["low"], facts["high"])
    np.testing.assert_array_equal(runner.grey(runner.source.read(0, 1)[0]), volume.image[train[0]])
    assert settle(monkeypatch, deep, window=(100.0, 9000.0))[0].window == (100.0, 9000.0)
    assert settle(monkeypatch, IMAGE)[0].window == (0.0, 255.0)


def test_models_of_whole_slices_see_other_slices_in_tiles_as_large_as_those_of_training(
    monkeypatch,
):
    write_model(Path("m"), longest_edge=70, tile=0, overlap=0.0)
    segmenter, _ = load_model(Path("m"))
    _, runner = settle(monkeypatch, IMAGE)  # as in training: one tile of 63 x 70 pixels
    np.testing.assert_allclose(segmented(runner), predicted(Path("m"), IMAGE), atol=5e-3)
    _, runner = settle(monkeypatch, np.tile(IMAGE, (1, 1, 3)))
    own = segmenter.spec.changed(longest_edge=0, scale=0.7, tile=56, overlap=0.5)
    assert runner.geo == geometry((90, 300), own, 14)
    assert np.isfinite(segmented(runner)).all()


def test_models_that_see_neighbours_warn_of_slices_much_farther_apart(capsys, monkeypatch):
    for context in (0, 1):
        write_model(Path("m"), context=context)
        settle(monkeypatch, IMAGE, voxel_nm=(30.0, 5.0, 5.0))
        assert not capsys.readouterr().err
        settle(monkeypatch, IMAGE, voxel_nm=(300.0, 5.0, 5.0))
        assert ("slices are 300 nm apart" in capsys.readouterr().err) == bool(context)


def test_a_change_under_a_run_is_noticed(monkeypatch):
    write_model(Path("m"))
    settled, _ = settle(monkeypatch, IMAGE)
    card = Path("m/model.json")
    card.write_text(card.read_text().replace('"overlap": 0.4', '"overlap": 0.5'))
    with pytest.raises(InputError, match="another content than when the run began"):
        open_runner(settled)
