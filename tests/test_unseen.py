"""IoU over the whole of a dataset that a model has seen no label of."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from emadapt.data.ingest import open_volume
from emadapt.metrics.pixels import overlap_counts
from emadapt.models.adapters import merge
from emadapt.models.predict import predict_slices
from emadapt.study.datasets import DatasetSettings, TrainSetSettings
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.model_files import load_model
from emadapt.training.train import train_unit
from emadapt.training.unseen import score_unseen, spaced, unseen_by
from fakes import a_study
from tiny import make_study, predict_slice, regime_for, settings


def test_slices_are_20_nm_apart():
    assert spaced(5, 20.0) == [0, 1, 2, 3, 4]
    assert spaced(9, 5.0) == [0, 4, 8]
    assert spaced(1, 1.0) == [0]


def test_the_same_images_under_another_name_are_not_unseen(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    stack = {"layout": "stack", "voxel_nm": (5.0, 5.0, 5.0)}
    made = {"layout": "synthetic", "voxel_nm": (30.0, 6.0, 6.0)}
    study = a_study(
        datasets={
            "folder": stack | {"path": str(tmp_path)},
            "through_a_link": stack | {"path": str(tmp_path / "link")},
            "few": made | {"domains": 2},
            "more": made | {"domains": 3, "classes": {"er": (2,)}},
            "another": made | {"domains": 2, "seed": 1},
        },
        train_sets={name: {"datasets": (name,)} for name in ("folder", "few")},
    )
    model = regime_for({"arch": "tiny_dinov2", "source": "random"}).build(0)
    folder, few = (Unit("dinov2_s", "frozen", name, 0) for name in ("folder", "few"))
    assert unseen_by(study, folder, model) == ["few", "more", "another"]
    assert unseen_by(study, few, model) == ["folder", "through_a_link", "another"]


def test_which_datasets_are_unseen():
    study = a_study()
    first, backbone = study.seeds[0], {"arch": "tiny_dinov2", "source": "random"}
    model = regime_for(backbone).build(0)

    def unseen(regime: str, train_set: str) -> list[str]:
        return unseen_by(study, Unit("dinov2_s", regime, train_set, first), model)

    assert unseen("frozen", "lucchi") == ["vnc"]
    assert unseen("frozen", "paired") == []
    specs = {
        "from_vnc": regime_settings(kind="lora", warm_start="frozen-vnc"),
        "after": regime_settings(kind="lora", warm_start="from_vnc"),
        "folder": regime_settings(kind="lora", warm_start="models/some"),
        "after_folder": regime_settings(kind="lora", warm_start="folder"),
    }
    study = dataclasses.replace(study, regime_settings=study.regime_settings | specs)
    for regime in specs:
        assert unseen(regime, "lucchi") == [], regime
    mispaired = DatasetSettings(
        layout="lucchi", voxel_nm=(5, 5, 5), path="data/lucchi", pairing="lexicographic"
    )
    onto = TrainSetSettings(datasets=("lucchi",), unlabelled=("vnc",))
    sets = {"wrong": TrainSetSettings(datasets=("wrong",)), "to_vnc": onto}
    study = dataclasses.replace(
        study,
        datasets=("lucchi", "wrong", "vnc"),
        dataset_settings=study.dataset_settings | {"wrong": mispaired},
        train_set_settings=study.train_set_settings | sets,
    )
    assert unseen("frozen", "wrong") == ["vnc"]  # the right labels are on images it has seen
    assert unseen("frozen", "vnc") == ["lucchi"]  # mispaired labels are not worth a score
    assert unseen("frozen", "to_vnc") == ["vnc"]  # images alone
    deep = regime_settings(kind="resunet3d", patch=(2, 32, 32), channels=(2,) * 5)
    model = regime_for(backbone, deep, "resunet3d").build(0)
    assert unseen("frozen", "lucchi") == [], "a model of blocks wants neighbours"


@pytest.mark.parametrize("regime", ["frozen", "lora"])
def test_every_slice_is_scored_as_a_user_would_predict_it(
    regime, tmp_path, tracking_off, plain_pictures
):
    study = make_study(tmp_path, settings(epochs=1, steps_per_epoch=2))
    unit = Unit("t", regime, "a", 0)
    train_unit(study, unit)
    test = json.loads(evaluate_unit(study, unit).read_text())["test"]
    assert "unseen" not in test["a"]
    own, volume = test["b"]["unseen"], open_volume("b")
    assert own["slices"] == spaced(len(volume.image), volume.manifest["voxel_nm"][0])
    assert set(own["slices"]) & set(volume.split["train"])
    assert own["n"] == len(own["counts"]) > test["b"]["n"]
    known = dict(zip(test["b"]["slices"], test["b"]["counts"], strict=True))
    assert all(
        own["counts"][own["slices"].index(z)] == counts
        for z, counts in known.items()
        if z in own["slices"]
    )
    segmenter, _ = load_model(Path("build/units") / unit.name)
    merge(segmenter.backbone)
    predicted = np.array(
        [predict_slice(segmenter, np.asarray(volume.image[z])) > 0.5 for z in own["slices"]]
    )
    label = np.array([np.asarray(volume.label[z]) > 0 for z in own["slices"]])
    # Cached tokens are fp16.
    assert own["iou"] == pytest.approx(jaccard_score(label.ravel(), predicted.ravel()), abs=2e-3)


def test_slices_are_smoothed_with_all_of_their_neighbours(tmp_path, tracking_off):
    params = settings(epochs=1, steps_per_epoch=2)
    params["backbones"]["t"]["smooth_z_nm"] = 20.0
    params["datasets"]["b"]["voxel_nm"] = [10, 4, 4]
    study = make_study(tmp_path, params)
    unit, volume = Unit("t", "frozen", "a", 0), open_volume("b")
    segmenter, _ = load_model(train_unit(study, unit))
    whole = dict(predict_slices(segmenter, volume, list(range(len(volume.image)))))
    own = score_unseen(segmenter, volume, [], [])
    assert own["slices"] == [0, 2, 4, 6, 8]
    expected = [
        overlap_counts(whole[z] > 0.5, np.asarray(volume.label[z]) > 0) for z in own["slices"]
    ]
    np.testing.assert_array_equal(own["counts"], expected)
