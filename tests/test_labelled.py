"""Few labels: what is drawn, and that a unit sees nothing else."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from emadapt.data.ingest import open_volume
from emadapt.data.labelled import choose
from emadapt.data.tiles import geometry
from emadapt.pipeline.check import check_study
from emadapt.study.study import Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.plan import unit_key
from emadapt.training.prepare import prepare
from emadapt.training.train import train_unit
from tiny import make_study, settings

KINDS = ("frozen", "lora", "last", "ridge", "knn", "unet2d")


@pytest.fixture
def study(tmp_path, tracking_off, monkeypatch):
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    return make_study(tmp_path, params())


def params(**train_sets: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2)
    own["regimes"] |= {"last": {"kind": "lora_last_k", "k": 1, "rank": 2, "alpha": 4}}
    own["regimes"] |= {kind: {"kind": kind} for kind in ("ridge", "knn", "unet2d")}
    own["train_sets"] |= {
        "two": {"datasets": ["a"], "slices": 2},
        "half": {"datasets": ["a", "b"], "slices": "50%"},
        "tiles": {"datasets": ["a"], "crops": 3},
        **train_sets,
    }
    own["study"] |= {"regimes": list(KINDS), "train_sets": list(own["train_sets"]), "seeds": [0, 1]}
    return own


@pytest.mark.parametrize(("total", "n"), [(1, 1), (10, 3), (48, 7), (48, 48), (5, 4)])
def test_places_are_spread_one_in_each_stretch(total, n):
    drawn = np.array([choose(total, n, seed) for seed in range(200)])
    assert (np.diff(drawn, axis=1) > 0).all()
    for i in range(n):  # every place of a stretch is drawn, and none outside
        assert set(drawn[:, i]) == set(range(total * i // n, total * (i + 1) // n))
    assert choose(total, n, 7) == choose(total, n, 7)


@pytest.mark.parametrize(
    "regime",
    [{"kind": "frozen"}, {"kind": "resunet3d", "patch": [2, 32, 32], "channels": [2, 3, 4, 5, 6]}],
)
def test_check_counts_slices_and_tiles_as_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regime: dict
) -> None:
    monkeypatch.chdir(tmp_path)
    own = settings()
    own["regimes"] = {"r": regime}
    own["train_sets"] = {"tiles": {"datasets": ["a", "b"], "crops": 3}}
    own["study"] |= {"regimes": ["r"], "train_sets": ["tiles"]}
    study = make_study(tmp_path, own)
    slices = len(open_volume("a").split["train"])
    counts = prepare(study, Unit("t", "r", "tiles", 0)).labelled.counts
    tiles = counts["crops"][1] // 2  # two datasets of one shape and split
    for key, total in [("crops", tiles)] + [("slices", slices)] * (regime["kind"] == "frozen"):
        for n, problems in ((total, 0), (total + 1, 2)):
            own["train_sets"]["tiles"] = {"datasets": ["a", "b"], key: n}
            (tmp_path / "params.yaml").write_text(yaml.safe_dump(own))
            found = check_study(tmp_path / "params.yaml")
            assert len(found) == problems, (key, n, found)
            assert all(
                f"{key} of {d}" in line and f"at most {total}" in line
                for d, line in zip("ab", found, strict=False)
            )


@pytest.mark.parametrize(
    "kind",
    [k if k in ("frozen", "ridge") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
@pytest.mark.parametrize("train_set", ["two", pytest.param("tiles", marks=pytest.mark.slow)])
def test_a_unit_sees_nothing_but_what_is_labelled(study, kind, train_set):
    """Another label, or image, anywhere else in the training part changes nothing."""
    unit = Unit("t", kind, train_set, 0)
    before = train_unit(study, unit)
    first = (before / "model.safetensors").read_bytes()
    counts = json.loads((before / "model.json").read_text())["labelled"]
    volume = open_volume("a")
    assert counts["crops"][1] == len(volume.split["train"]) * 4  # 90 x 100 in tiles of 64
    assert counts["slices"][0] == 2 if train_set == "two" else counts["crops"][0] == 3
    inputs = prepare(study, unit)
    labelled = np.zeros(volume.image.shape, bool)
    if train_set == "two":
        labelled[inputs.volumes[0].split["train"]] = True
    else:
        height, width = geometry((90, 100), inputs.segmenter.spec, inputs.segmenter.patch).tile
        for z, y, x in inputs.labelled.tiles[0]:
            labelled[z, y : y + height, x : x + width] = True
    spoil(volume.split["train"], labelled)
    forget()
    assert (train_unit(study, unit) / "model.safetensors").read_bytes() == first
    evaluate_unit(study, unit)


def spoil(train: list[int], keep: np.ndarray) -> None:
    """Scramble the ingested training slices but for `keep`; every key stays as it is."""
    rng = np.random.default_rng(0)
    for name in ("image", "label"):
        array = np.load(f"build/ingest/a/{name}.npy")
        noise = rng.integers(0, 256 if name == "image" else 2, array.shape).astype(np.uint8)
        for z in train:
            array[z][~keep[z]] = noise[z][~keep[z]]
        np.save(f"build/ingest/a/{name}.npy", array)


def forget() -> None:
    """Nothing that was trained or cached."""
    for folder in ("scratch", "build/units"):
        shutil.rmtree(folder, ignore_errors=True)


def test_seeds_and_amounts_make_other_models(study):
    units = itertools.product(("a", "two", "tiles", "half"), (0, 1))
    keys = {unit_key(study, Unit("t", "ridge", name, seed)) for name, seed in units}
    assert len(keys) == 7  # `a` has one
    drawn = [prepare(study, Unit("t", "frozen", "half", seed)) for seed in (0, 1)]
    assert drawn[0].labelled.counts["slices"] == (4, 10)  # of 5 slices each
    sizes = [[len(v.split["train"]) for v in inputs.volumes] for inputs in drawn]
    assert sizes[0] == sizes[1]


def test_few_labels_of_one_dataset_beside_all_of_another(tmp_path, study):
    """A map gives them: the same slices as the dataset alone with so few."""
    sets = {
        "mixed": {"datasets": ["a", "b"], "slices": {"b": 2}},
        "few": {"datasets": ["b"], "slices": 2},
    }
    mixed = make_study(tmp_path / "mixed", params(**sets))
    for seed in (0, 1):
        volumes = {v.name: v for v in prepare(mixed, Unit("t", "frozen", "mixed", seed)).volumes}
        [alone] = prepare(mixed, Unit("t", "frozen", "few", seed)).volumes
        assert [len(v.split["train"]) for v in volumes.values()] == [5, 2]
        assert volumes["b"].split["train"] == alone.split["train"]
