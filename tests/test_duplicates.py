"""Units that cannot differ are trained once."""

import json

import pytest

from emadapt.models import unet2d
from emadapt.training import duplicates
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.plan import unit_key
from emadapt.training.train import train_unit
from tiny import make_study, settings

SAME = [("t-ridge-a-0", "t-ridge-a-1"), ("t-unet2d-a-0", "u-unet2d-a-0")]
"""Units that are one model."""


@pytest.fixture
def study(tmp_path, tracking_off, monkeypatch):
    monkeypatch.setattr(unet2d, "FEATURES", (8, 8, 16, 32, 64, 8))
    params = settings(epochs=1, steps_per_epoch=1)
    same = params["backbones"]["t"]
    params["backbones"] |= {"u": same | {"arch": "tiny_dinov3"}, "wide": same | {"tile": 80}}
    params["regimes"] = {kind: {"kind": kind} for kind in ("frozen", "ridge", "knn", "unet2d")}
    params["train_sets"]["two"] = {"datasets": ["a"], "slices": 2}
    params["study"] |= {
        "backbones": list(params["backbones"]),
        "regimes": list(params["regimes"]),
        "train_sets": ["a", "paired", "two"],
        "seeds": [0, 1],
    }
    return make_study(tmp_path, params)


def test_which_units_are_the_same_model(study):
    def key(name: str) -> str:
        return unit_key(study, study.unit(name))

    assert all(key(one) == key(other) for one, other in SAME)
    different = """t-ridge-a-0 t-ridge-two-0 t-ridge-two-1 t-ridge-paired-0 u-ridge-a-0 t-knn-a-0
        t-knn-a-1 t-frozen-a-0 t-frozen-a-1 t-unet2d-a-0 t-unet2d-a-1 wide-unet2d-a-0"""
    assert len({key(name) for name in different.split()}) == 12


def test_a_damaged_or_half_written_neighbour_is_no_duplicate(tracking_off):
    known = '{"key": "k", "unit": "me"}'
    for name, text in {"broken": "{", "list": "[]", "me": known, ".half.part": known}.items():
        (duplicates.UNITS / name).mkdir(parents=True)
        (duplicates.UNITS / name / "model.json").write_text(text)
    assert duplicates.find("k", "me") is None
    assert duplicates.find("k") == duplicates.UNITS / "me"


@pytest.mark.parametrize(("first", "second"), SAME)
def test_a_duplicate_is_copied_under_its_own_name_and_not_trained(
    study, plain_pictures, monkeypatch, first, second
):
    one, other = study.unit(first), study.unit(second)
    trained = train_unit(study, one)
    with monkeypatch.context() as patch:
        for work in ("regimes.regime.fit", "regimes.ridge.choose", "train.validate"):
            patch.setattr(f"emadapt.training.{work}", lambda *_: pytest.fail("trained again"))
        copied = train_unit(study, other)
    for file in ("model.safetensors", "history.json"):
        assert (copied / file).read_bytes() == (trained / file).read_bytes()
    card, original = (
        json.loads((folder / "model.json").read_text()) for folder in (copied, trained)
    )
    assert (card["unit"], card["key"]) == (other.name, original["key"])
    assert (card["val"], card["best_epoch"]) == (original["val"], original["best_epoch"])
    assert 0 <= json.loads(evaluate_unit(study, other).read_text())["test"]["a"]["iou"] <= 1
