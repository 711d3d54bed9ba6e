"""A task is a dataset and an organelle: from settings over labels with several ids to the volume that is trained on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from emadapt.data.ingest import ingest, open_volume
from emadapt.data.phantom import CLASSES, make_volume
from emadapt.data.phantom_domains import ORGANELLES
from emadapt.errors import ConfigError, InputError
from emadapt.study.study import DatasetSettings, digest, load_study
from tiny import blobs, make_study, settings

IDS = {"mitochondria": [1], "er": [2], "cells": [1, 2, 3]}


def organelle_settings(organelle: str = "er", **more) -> dict:
    params = settings()
    del params["datasets"]["a"]["foreground"]
    params["datasets"]["a"] |= {"organelles": IDS, "organelle": organelle, **more}
    return params


def write_labels(root: Path, ids: list[int]) -> np.ndarray:
    _, label = blobs((10, 90, 100), 0)
    coloured = label * np.random.default_rng(0).choice(ids, label.shape).astype(np.uint8)
    tifffile.imwrite(root / "data/a/label.tif", coloured, photometric="minisblack")
    return coloured


@pytest.mark.parametrize("organelle", IDS)
def test_the_volume_has_the_organelle_that_was_chosen(tmp_path: Path, organelle: str) -> None:
    study = make_study(tmp_path, organelle_settings(organelle), ingested=False)
    label = write_labels(tmp_path, [1, 2, 3])
    ingest(study, "a", tmp_path / "data", tmp_path / "build")
    volume = open_volume("a", tmp_path / "build")
    np.testing.assert_array_equal(volume.label > 0, np.isin(label, IDS[organelle]))
    assert (volume.manifest["organelle"], volume.manifest["foreground"]) == (
        organelle,
        list(IDS[organelle]),
    )
    assert volume.manifest["foreground"] == IDS[organelle]


def test_other_organelles_ids_are_not_part_of_the_task(tmp_path: Path) -> None:
    study = make_study(tmp_path, organelle_settings(), ingested=False)
    write_labels(tmp_path, [1, 2, 3])
    ingest(study, "a", tmp_path / "data", tmp_path / "build")
    before, described = (
        open_volume("a", tmp_path / "build").md5,
        study.dataset_settings["a"].described(),
    )
    more = organelle_settings(organelles=IDS | {"vesicles": [9]})
    (tmp_path / "params.yaml").write_text(json.dumps(more))
    study = load_study(tmp_path / "params.yaml")
    ingest(study, "a", tmp_path / "data", tmp_path / "build")
    assert (open_volume("a", tmp_path / "build").md5, study.dataset_settings["a"].described()) == (
        before,
        described,
    )


def test_an_id_that_no_slice_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    study = make_study(tmp_path, organelle_settings("cells"), ingested=False)
    write_labels(tmp_path, [1, 3])
    with pytest.raises(
        InputError, match=r"without id 2 in any slice.*\[1, 2, 3\], cells.*organelles"
    ):
        ingest(study, "a", tmp_path / "data", tmp_path / "build")
    study = dataclasses.replace(
        study,
        dataset_settings={"a": dataclasses.replace(study.dataset_settings["a"], organelle="er")},
    )
    with pytest.raises(InputError, match="without id 2"):
        ingest(study, "a", tmp_path / "data", tmp_path / "build")
    assert not list(tmp_path.glob("build/*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"organelle": "golgi"}, r"found golgi; expected one of mitochondria, er, cells"),
        ({"organelle": ""}, r"found nothing; expected one of mitochondria, er, cells"),
        ({"foreground": [1]}, "organelle and foreground"),
        ({"organelles": {"er": 2}}, "a list that is not empty"),
        ({"organelles": {"e r": [2]}}, "a map of names"),
    ],
)
def test_settings_that_do_not_say_what_is_segmented(
    tmp_path: Path, change: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_study(tmp_path, organelle_settings(**change), ingested=False)


def test_datasets_without_organelles_are_described_as_before(tmp_path: Path) -> None:
    spec = DatasetSettings("stack", (30.0, 5.0, 5.0), (1,))
    assert digest(spec.described()) == digest(
        {
            "layout": "stack",
            "voxel_nm": [30.0, 5.0, 5.0],
            "foreground": [1],
            "pairing": "number",
            "path": "",
        }
    )
    study = make_study(tmp_path, organelle_settings(), ingested=False)
    described = study.describe(study.unit("t-frozen-a-0"))["datasets"]["a"]
    assert (described["organelle"], described["organelles"]) == ("er", {"er": IDS["er"]})
    assert load_study(tmp_path / "params.yaml").dataset_settings["a"].rule == (2,)


@pytest.mark.parametrize("domain", ORGANELLES)
def test_phantoms_have_all_organelles_inside_neurites(domain: str) -> None:
    image, label = make_volume(domain, (6, 192, 192), 1)
    assert len({d.voxel_nm for d in ORGANELLES.values()}) == 3
    share = {name: (label == value).mean() for name, value in CLASSES.items()}
    assert set(np.unique(label)) <= {0, *CLASSES.values()}
    assert share["mitochondria"] > 0.01
    assert share["er"] > 0.005
    assert share["lipid_droplets"] > 0.002
    assert (
        0.4
        < share["neurites"] + share["mitochondria"] + share["er"] + share["lipid_droplets"]
        < 0.95
    )
    droplet, rest = image[label == CLASSES["lipid_droplets"]], image[label == CLASSES["neurites"]]
    assert abs(droplet.mean() - rest.mean()) > 25
