"""A user's own volume to a model: from images alone, and from a few labelled slices."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from safetensors.torch import load_file

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.segment import adapt as own_model
from emadapt.segment.job import Order
from emadapt.segment.labelled import labelled, paired
from emadapt.segment.run import segment_volume
from emadapt.study.regimes import regime_settings
from emadapt.volumes.opening import open_source
from tiny import blobs, stop_at_a_checkpoint, write_model

IMAGE, LABEL = blobs((9, 90, 100), 0)
VOXEL = ("--voxel-nm", "40", "5", "5")


@pytest.fixture(autouse=True)
def place(tracking_off, monkeypatch):
    """A folder with a volume, a few labels and a model; less work than for a user."""
    tifffile.imwrite("v.tif", IMAGE, photometric="minisblack")
    Path("labels").mkdir()
    for z in (1, 3, 5, 8):
        tifffile.imwrite(f"labels/{z}.tif", LABEL[z] * 255, photometric="minisblack")
    write_model(Path("m"), facts={"second_pixel_nm": 6.0})
    monkeypatch.setattr(own_model, "DOMAINS", 3)
    quick = own_model.TRAIN.changed(epochs=2, steps_per_epoch=2)
    monkeypatch.setattr(own_model, "TRAIN", quick)


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code, done.output
    return done.output


def segments(model: str) -> None:
    segment_volume(Order("v.tif", "mask.tif", model, voxel_nm=(40.0, 5.0, 5.0)))
    assert tifffile.imread("mask.tif").shape == IMAGE.shape


@pytest.mark.slow
def test_images_alone_give_a_model_and_a_stopped_run_goes_on(monkeypatch):
    run("adapt", "v.tif", "--model", "m", *VOXEL, "-o", "new")
    card = json.loads(Path("new/model.json").read_text())
    assert set(card["unlabelled_md5"]) == {"v"}
    assert "its images, without labels" in Path("new/model-card.md").read_text()
    assert not Path("new.partial").exists()
    segments("new")
    before, after = (load_file(f"{name}/model.safetensors") for name in ("m", "new"))
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[k], after[k]) for k in before)
    again = run("adapt", "v.tif", "--model", "m", *VOXEL, "-o", "new", code=2)
    assert "Replace it with --overwrite" in again
    with monkeypatch.context() as patch:
        stop_at_a_checkpoint(patch)
        run("adapt", "v.tif", "--model", "m", *VOXEL, "-o", "killed", code=1)
    with monkeypatch.context() as patch:
        patch.setattr(own_model, "_sample", None)  # it is not read again
        run("adapt", "v.tif", "--model", "m", *VOXEL, "-o", "killed")
    new, killed = (Path(name, "model.safetensors").read_bytes() for name in ("new", "killed"))
    assert new == killed


def test_a_few_labels_give_a_model_and_what_validation_says():
    twice = ("--voxel-nm", "40", "10", "10")
    Path("v.tif").rename("my volume.tif")
    said = run("tune", "my volume.tif", "labels", "--model", "m", *twice, "-o", "new")
    assert "IoU on slices kept out of training (8.tif): " in said
    card = json.loads(Path("new/model.json").read_text())
    assert card["labelled"]["slices"] == [3, 3]
    assert card["backbone"]["pixel_nm"] == 5.0  # that of training
    assert card["second_pixel_nm"] == 6.0
    following = shlex.split(said.partition("; next: emadapt ")[2].splitlines()[0])
    run(*following)


def test_only_a_model_is_replaced():
    words = ("tune", "v.tif", "labels", "--model", "m", *VOXEL, "--overwrite", "-o")
    for output in (".", "labels", "v.tif"):
        assert "expected no folder yet, or a model" in run(*words, output, code=2)
    run(*words, "new")
    before = Path("new/model.json").stat().st_ino
    run(*words, "new")
    assert Path("new/model.json").stat().st_ino != before
    Path("new/notes.txt").write_text("mine")
    run(*words, "new", code=2)
    assert Path("new/notes.txt").read_text() == "mine"
    assert Path("v.tif").is_file()
    assert len([*Path("labels").iterdir()]) == 4


def test_labels_of_several_classes_have_the_ids_of_masks():
    write_model(Path("two"), classes=("membrane", "vesicle"))
    for z in (1, 3, 5, 8):
        ids = LABEL[z] + np.triu(LABEL[z])
        tifffile.imwrite(f"labels/{z}.tif", ids, photometric="minisblack")
    said = run("tune", "v.tif", "labels", "--model", "two", *VOXEL, "-o", "new")
    assert "IoU on slices kept out of training (8.tif): " in said
    assert json.loads(Path("new/model.json").read_text())["classes"] == ["membrane", "vesicle"]
    segment_volume(Order("v.tif", "mask.tif", "new", voxel_nm=(40.0, 5.0, 5.0)))
    assert set(np.unique(tifffile.imread("mask.tif"))) <= {0, 1, 2}
    said = run("adapt", "v.tif", "--model", "two", *VOXEL, code=2)
    assert "a model of several classes; expected one of one class" in said


INVERTED = "ImageJ=1.54f\nimages=9\nslices=9\nloop=false\n"  # what Fiji's *Convert to Mask* gives
EDITORS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, dict[str, Any]]]] = {
    "Fiji, a mask": lambda ids: (
        np.uint8(255) * (ids > 0),
        {"photometric": "miniswhite", "description": INVERTED, "metadata": None},
    ),
    "Fiji, ids in colours": lambda ids: (
        ids.astype("u1"),
        {
            "photometric": "palette",
            "colormap": np.random.default_rng(0).integers(0, 2**16, (3, 256), np.uint16),
            "description": INVERTED,
            "metadata": None,
        },
    ),
    "Fiji, many ids": lambda ids: (ids.astype("f4"), {"imagej": True, "metadata": {"axes": "ZYX"}}),
    "napari": lambda ids: (ids.astype("i8"), {"compression": "zlib"}),
    "NumPy, a mask": lambda ids: (ids > 0, {}),
}
"""What programs make of edited objects: pixels and arguments of tifffile."""


@pytest.mark.parametrize("editor", EDITORS)
def test_an_edited_stack_gives_the_labels_of_its_slices(editor):
    edited = np.where(LABEL > 0, np.arange(1, 10)[:, None, None], 0)
    edited[[0, 2]] = 0
    array, about = EDITORS[editor](edited)
    tifffile.imwrite("edited.tif", array, **about)
    opened, places = labelled(open_source("v.tif"), Path("edited.tif"), ())
    assert places == {z: z for z in (1, 3, 4, 5, 6, 7, 8)}
    assert np.array_equal(opened.read(0, 9) > 0, edited > 0)
    _, places = labelled(open_source("v.tif"), Path("edited.tif"), (7, 2))
    assert list(places) == [2, 7]
    with pytest.raises(InputError, match="two or more of 0 to 8"):
        labelled(open_source("v.tif"), Path("edited.tif"), (7, 9))


def test_tune_goes_on_from_a_corrected_mask():
    segments("m")
    mask = tifffile.imread("mask.tif")
    mask[[1, 4, 7]] = LABEL[[1, 4, 7]] * 255
    tifffile.imwrite("corrected.tif", mask, imagej=True, metadata={"axes": "ZYX"})
    chosen = ("--slice", "1", "--slice", "4", "--slice", "7")
    said = run("tune", "v.tif", "corrected.tif", "--model", "m", *VOXEL, "-o", "new", *chosen)
    assert "(corrected.tif, slice 7)" in said
    assert json.loads(Path("new/model.json").read_text())["labelled"]["slices"] == [2, 2]
    tifffile.imwrite("part.tif", mask[:5], photometric="minisblack")
    said = run("tune", "v.tif", "part.tif", "--model", "m", *VOXEL, "-o", "other", code=2)
    assert "expected (9, 90, 100), as the volume" in said


def test_all_labelled_slices_count_but_those_near_validation():
    thin = ("--model", "m", "--voxel-nm", "10", "5", "5")
    said = run("tune", "v.tif", "labels", *thin, "-o", "new")  # 1, 3 and 5; 8 is kept out
    assert json.loads(Path("new/model.json").read_text())["labelled"]["slices"] == [3, 3]
    shutil.copy("labels/8.tif", "labels/7.tif")
    said = run("tune", "v.tif", "labels", *thin, "-o", "new", "--overwrite")
    assert "labelled slices 7 are left out: nearer than 30 nm" in said
    assert json.loads(Path("new/model.json").read_text())["labelled"]["slices"] == [3, 3]
    stack = np.where(np.isin(np.arange(9), (4, 5, 6))[:, None, None], LABEL, 0)
    tifffile.imwrite("near.tif", stack, photometric="minisblack")
    said = run("tune", "v.tif", "near.tif", *thin, "-o", "other", code=2)
    assert "found labelled slices within 30 nm; expected one that is farther away" in said


def test_labels_pair_by_number_and_all_that_is_odd_is_listed():
    shutil.copy("labels/3.tif", "labels/x03.tif")
    shutil.copy("labels/3.tif", "labels/9.tif")
    said = run("tune", "v.tif", "labels", "--model", "m", *VOXEL, code=2)
    assert "x03.tif and 3.tif have one number" in said
    assert "9.tif has no slice" in said
    Path("slices").mkdir()
    for z, image in enumerate(IMAGE):
        tifffile.imwrite(f"slices/s{z + 10}.tif", image, photometric="minisblack")
    source = open_source("slices")
    with pytest.raises(InputError, match=r"1\.tif has no slice"):
        paired(source, Path("labels"))
    for file in Path("labels").iterdir():
        file.unlink()
    for z in (12, 15):
        tifffile.imwrite(f"labels/{z}.tif", LABEL[0], photometric="minisblack")
    assert list(paired(source, Path("labels"))) == [2, 5]


def test_what_is_refused_before_training() -> None:
    words = ("tune", "v.tif", "labels", "--model", "m", *VOXEL, "-o")
    assert "expected >N, such as >127" in run(*words, "new", "--foreground", "127", code=2)
    assert "or a part of it" in run(*words, "labels/new", code=2)
    assert len([*Path("labels").iterdir()]) == 4
    tifffile.imwrite("labels/8.tif", 0 * LABEL[8], photometric="minisblack")
    assert "no foreground in 8.tif, kept out of training" in run(*words, "new", code=2)
    Path("v.tif").rename("synthetic.tif")
    assert own_model.Own("synthetic.tif", "m", Path("new")).name != "synthetic"


def test_models_that_do_not_suit_are_refused_before_work() -> None:
    write_model(Path("near"), context=1)
    said = run("tune", "v.tif", "labels", "--model", "near", *VOXEL, code=2)
    assert "neighbouring slices" in said
    write_model(Path("ridge"), regime=regime_settings(kind="ridge"))
    said = run("adapt", "v.tif", "--model", "ridge", *VOXEL, code=2)
    assert "a model of kind ridge; expected one that is trained in steps" in said


def test_parts_of_large_slices_move_over_the_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_model, "SIDE", 40)
    own = own_model.Own("v.tif", "m", Path("new"), voxel_nm=(40.0, 5.0, 5.0))
    images, spacing = own_model._sample(own)
    assert images.shape == (9, 40, 40)
    assert spacing > 1000
    places = set()
    for z, image in enumerate(images):
        windows = np.lib.stride_tricks.sliding_window_view(IMAGE[z], (40, 40))
        places |= {tuple(p) for p in np.argwhere((windows == image).all((2, 3)))}
    assert len(places) == 9
