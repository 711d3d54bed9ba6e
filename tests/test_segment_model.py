"""How a user's slices enter a model: voxel size, grey values, alignment, whole-slice models; and what a model must say."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emadapt.data.align import Statistics, statistics
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.data.tiles import geometry
from emadapt.errors import InputError
from emadapt.models.predict import predict_slice, predict_slices
from emadapt.models.segmenter import load_segmenter
from emadapt.segment import job as job_module
from emadapt.segment.job import Job, Order, Runner, open_runner, prepare
from emadapt.segment.model import find_model, open_model, zoom_for
from emadapt.study.study import RegimeSettings
from emadapt.volumes.source import array_source
from tiny import blobs, make_study, write_model

IMAGE, LABEL = blobs((3, 90, 100), 4)
ORDER = Order("array", "", "m", voxel_nm=(30.0, 5.0, 5.0))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settle(monkeypatch: pytest.MonkeyPatch, image: np.ndarray, **change: Any) -> tuple[Job, Runner]:
    """A job on an array as if it were a file."""
    monkeypatch.setattr(job_module, "open_source", lambda *_: array_source(image, None))
    settled = prepare(dataclasses.replace(ORDER, **change))
    return settled, open_runner(settled)


def predicted(runner: Runner) -> np.ndarray:
    blocks = runner.job.blocks()
    return np.concatenate(
        [rows for b in blocks for _, _, rows in runner.probability(b, runner.load(b))]
    ).reshape(runner.job.shape)


def test_pixels_of_another_size_are_resampled_to_those_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_model(Path("m"))
    settled, runner = settle(monkeypatch, IMAGE, voxel_nm=(30.0, 10.0, 2.5))
    assert (settled.dataset, settled.zoom) == ("a", (2.0, 0.5))
    segmenter, _ = load_segmenter(Path("m"))
    small = np.asarray(Image.fromarray(IMAGE[1]).resize((50, 180), Image.Resampling.BICUBIC))
    back = Image.fromarray(predict_slice(segmenter, small)).resize(
        (100, 90), Image.Resampling.BILINEAR
    )
    np.testing.assert_allclose(
        predicted(runner)[1], np.asarray(back), atol=0.02
    )  # grey values rounded in another order


def test_pixels_of_nearly_the_same_size_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(Path("m"))
    for size, zoom in ((5.4, 1.0), (4.6, 1.0), (5.6, 1.12), (4.5, 0.9)):
        assert settle(monkeypatch, IMAGE, voxel_nm=(50.0, size, size))[0].zoom == (zoom, zoom)


def test_the_nearest_dataset_of_training_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(Path("m"), facts={"voxel_nm": {"fine": [5, 4, 4], "coarse": [40, 16, 16]}})
    model = open_model("m")
    assert zoom_for(model, (30.0, 15.0, 16.0)) == ("coarse", (1.0, 1.0))
    assert zoom_for(model, (30.0, 2.0, 2.0)) == ("fine", (0.5, 0.5))
    with pytest.raises(InputError, match="pixels of quite another size"):
        zoom_for(model, (30.0, 0.005, 0.005))  # micrometres taken for nanometres


def test_models_of_harmonised_voxels_are_resampled_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"md5": "", "voxel_nm": [30, 5, 5], "histogram": []}
    write_model(Path("m"), align="voxel", reference="a", facts={"align": {"reference": known}})
    assert settle(monkeypatch, IMAGE, voxel_nm=(30.0, 5.1, 5.0))[0].zoom == (1.02, 1.0)


def test_aligned_as_evaluate_aligns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset without a split: all slices count, for evaluate and here."""
    split = {"train": [0, 1, 2], "val": [], "test": []}
    volume = Volume("v", IMAGE, LABEL, {"split": split, "md5": "0" * 32, "voxel_nm": [30, 5, 5]})
    reference = Volume(
        "a", 255 - IMAGE // 2, LABEL, {"split": split, "md5": "1" * 32, "voxel_nm": [30, 5, 5]}
    )
    known = statistics(reference)
    write_model(
        Path("m"),
        align="histogram",
        reference="a",
        facts={"align": {"reference": dataclasses.asdict(known)}},
    )
    monkeypatch.setattr("emadapt.data.align.open_reference", lambda spec: reference)
    segmenter, _ = load_segmenter(Path("m"))
    expected = np.stack([p for _, p in predict_slices(segmenter, volume, [0, 1, 2])])
    settled, runner = settle(monkeypatch, IMAGE)
    np.testing.assert_array_equal(predicted(runner), expected)
    assert isinstance(settled.statistics, dict)
    assert Statistics(**settled.statistics).histogram == statistics(volume).histogram
    whole = [
        rows
        for _, _, rows in runner.probability(
            dataclasses.replace(settled.blocks()[0], y0=7, y1=60), None
        )
    ]
    np.testing.assert_array_equal(np.concatenate(whole).reshape(3, 53, 100), expected[:, 7:60])


def test_grey_values_as_ingest_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tifffile

    deep = (
        IMAGE.astype(np.uint16) * 200 + np.arange(3, dtype=np.uint16)[:, None, None] * 50
    ).repeat(4, 0)
    study = make_study(tmp_path, ingested=False)
    tifffile.imwrite(tmp_path / "data/a/image.tif", deep, photometric="minisblack")
    tifffile.imwrite(tmp_path / "data/a/label.tif", LABEL.repeat(4, 0), photometric="minisblack")
    ingest(study, "a", tmp_path / "data", tmp_path / "build/ingest")
    volume = open_volume("a", tmp_path / "build/ingest")
    train, facts = volume.split["train"], volume.manifest["intensity"]
    write_model(Path("m"))
    settled, runner = settle(monkeypatch, deep[train])
    assert settled.window == (facts["low"], facts["high"])
    read = runner.reader(0, runner.source.read(0, 1), 0)
    np.testing.assert_array_equal(read(0, 90), volume.image[train[0]])
    assert settle(monkeypatch, deep, window=(100.0, 9000.0))[0].window == (100.0, 9000.0)
    assert settle(monkeypatch, IMAGE)[0].window == (0.0, 255.0)


def test_whole_slice_models_see_other_slices_in_tiles_of_the_size_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_model(Path("m"), longest_edge=70, tile=0, overlap=0.0)
    segmenter, _ = load_segmenter(Path("m"))
    _, runner = settle(
        monkeypatch, IMAGE
    )  # 90 x 100, as in training: one tile of 63 x 70 pixels, floored to the patch
    np.testing.assert_array_equal(predicted(runner)[2], predict_slice(segmenter, IMAGE[2]))
    wide = np.tile(IMAGE, (1, 1, 3))
    _, runner = settle(monkeypatch, wide)
    assert runner.geo.resized == (63, 210)
    assert runner.geo.tile == (56, 56)
    assert runner.geo == geometry(
        (90, 300),
        dataclasses.replace(segmenter.spec, longest_edge=0, scale=0.7, tile=56, overlap=0.5),
        14,
    )
    assert np.isfinite(predicted(runner)).all()


@pytest.mark.parametrize(
    "regime",
    [RegimeSettings("frozen", align="norm"), RegimeSettings("lora", rank=2, align="routed")],
    ids=str,
)
def test_layers_of_the_nearest_dataset(
    regime: RegimeSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from emadapt.models.closest import token_statistics
    from emadapt.models.segmenter import build_segmenter, save_segmenter
    from emadapt.study.study import BackboneSettings

    spec = BackboneSettings(
        "tiny_dinov2", "random", tile=56, overlap=0.4, views=0, precision="fp32"
    )
    segmenter = build_segmenter(spec, regime, "linear", 0, ["dark", "bright"])
    split = {"train": [0, 1], "val": [2], "test": []}
    for name, image in (("dark", IMAGE // 3), ("bright", IMAGE)):
        own = Volume(name, image, LABEL, {"split": split, "md5": name, "voxel_nm": [30, 5, 5]})
        segmenter.domains[name] = token_statistics(segmenter, own, [0, 1])
    card = json.loads((write_model(Path("n")) / "model.json").read_text())
    save_segmenter(
        segmenter,
        Path("m"),
        {k: card[k] for k in ("unit", "threshold", "version", "voxel_nm", "shape", "intensity")},
    )
    for image, name in ((IMAGE // 3, "dark"), (IMAGE, "bright")):
        settled, runner = settle(monkeypatch, image)
        assert settled.domain == runner.model.segmenter.domain == name
        expected, _ = load_segmenter(Path("m"))
        expected.use(name)
        np.testing.assert_allclose(
            predicted(runner)[1], predict_slice(expected, image[1]), atol=1e-5
        )
    said = (
        "normalised as dark, the nearest"
        if regime.align == "norm"
        else "routed to dark, the nearest"
    )
    assert said in capsys.readouterr().out


def test_cards_that_do_not_say_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(Path("m"))
    card = json.loads(Path("m/model.json").read_text())

    def refused(**change: Any) -> str:
        Path("m/model.json").write_text(
            json.dumps({k: v for k, v in (card | change).items() if v is not None})
        )
        with pytest.raises(InputError) as error:
            settle(monkeypatch, np.tile(IMAGE, (1, 2, 1)))
        return str(error.value)

    assert "no voxel_nm: a model of another version" in refused(voxel_nm=None)
    assert "no threshold" in refused(threshold=None)
    assert "another version" in refused(backbone=card["backbone"] | {"a_new_setting": 1})
    whole = card["backbone"] | {"tile": 0}
    assert "no shape of a" in refused(backbone=whole, shape=None)
    Path("m/model.json").write_text(json.dumps({k: v for k, v in card.items() if k != "shape"}))
    settle(
        monkeypatch, IMAGE
    )  # a card from before the shape was kept is enough for a model of tiles


def test_models_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "build/units/t-frozen-a-0")
    assert find_model("t-frozen-a-0") == Path("build/units/t-frozen-a-0")
    with pytest.raises(InputError, match="a trained unit: t-frozen-a-0"):
        find_model("t-lora-a-0")


def test_adapters_are_merged() -> None:
    write_model(Path("m"), regime=RegimeSettings("lora", rank=2, alpha=4.0))
    layers = [m for m in open_model("m").segmenter.modules() if hasattr(m, "merged_adapters")]
    assert layers
    assert all(layer.merged_adapters for layer in layers)


def test_a_change_under_a_run_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(Path("m"))
    settled, _ = settle(monkeypatch, IMAGE)
    card = Path("m/model.json")
    card.write_text(card.read_text().replace('"overlap": 0.4', '"overlap": 0.5'))
    with pytest.raises(InputError, match="another content than when the run began"):
        open_runner(settled)
