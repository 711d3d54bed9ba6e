"""The model that ships: listed with scores and terms, and used where no other is named."""

import json

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from safetensors.numpy import load_file

from emadapt.cli import main
from emadapt.data.synthetic import make_domain
from emadapt.errors import InputError
from emadapt.files import file_md5
from emadapt.segment.adapt import Own
from emadapt.segment.job import Order, prepare
from emadapt.segment.model import find_model
from emadapt.segment.shipped import SHIPPED, STARTER
from emadapt.training.model_files import regime_from


def test_it_is_listed_with_scores_of_these_weights_and_no_terms_of_real_data():
    folder = find_model(STARTER)
    card, metrics = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("model", "metrics")
    )
    assert metrics["model_md5"] == file_md5(folder / "model.safetensors")
    assert list(card["data_md5"]) == ["synthetic"]
    lines = CliRunner().invoke(main, ["models"]).output
    for name, test in metrics["test"].items():
        assert f"IoU on {name} " in lines
        assert f"{test['iou']:.3f}" in lines
    assert "-NC" not in lines


def test_it_is_small_and_of_this_version_of_the_settings():
    folder = SHIPPED / STARTER
    regime = regime_from(json.loads((folder / "model.json").read_text()))
    assert regime.spec.pixel_nm == 6
    assert sum(value.size for value in load_file(folder / "model.safetensors").values()) < 1e6


@pytest.mark.slow
def test_a_volume_is_segmented_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, label, voxel = make_domain(0, 5, 1, 1500.0)
    tifffile.imwrite("image.tif", image)
    order = ["segment", "image.tif", "mask.tif"]
    run = CliRunner().invoke(main, [*order, "--voxel-nm", *map(str, voxel)])
    assert run.exit_code == 0, run.output
    found = tifffile.imread("mask.tif").reshape(label.shape) > 0
    assert (found & (label > 0)).sum() > 0.3 * (found | (label > 0)).sum()
    assumed = CliRunner().invoke(main, [*order, "--overwrite"])
    assert "no voxel size in the file: taken as 30 x 6 x 6 nm" in assumed.output
    assert np.prod(tifffile.imread("mask.tif").shape) == image.size


def test_a_size_of_pixels_that_a_file_states_is_never_replaced_by_that_of_training(tmp_path):
    file = tmp_path / "v.tif"
    tifffile.imwrite(file, np.eye(64, dtype="u1"), resolution=(1e6, 1e6), resolutionunit=3)
    with pytest.raises(InputError, match=r"only \? x 10 x 10 nm .* State it: --voxel-nm"):
        prepare(Order(str(file), "mask.tif"))


def test_tune_and_adapt_assume_the_size_of_pixels_that_segment_assumes(tmp_path):
    file = tmp_path / "v.tif"
    tifffile.imwrite(file, np.arange(4096, dtype="u1").reshape(64, 64))
    assert (
        Own(str(file), STARTER, tmp_path / "new").voxel == prepare(Order(str(file), "m")).voxel_nm
    )
