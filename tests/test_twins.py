"""Units that cannot differ are trained once."""

import json
from pathlib import Path
from typing import Any

import pytest

from emadapt.models import unet2d
from emadapt.study.study import Study, Unit
from emadapt.training import twins
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.plan import unit_key
from emadapt.training.train import train_unit
from tiny import make_study, settings


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    monkeypatch.setattr(unet2d, "FEATURES", (8, 8, 16, 32, 64, 8))
    params = settings(epochs=1, steps_per_epoch=1)
    same = params["backbones"]["t"]
    params["backbones"] |= {
        "u": same | {"arch": "tiny_dinov3", "tile": 64},
        "wide": same | {"tile": 80},
    }
    params["regimes"] = {kind: {"kind": kind} for kind in ("frozen", "ridge", "knn", "unet2d")}
    params["study"] |= {
        "backbones": list(params["backbones"]),
        "regimes": list(params["regimes"]),
        "seeds": [0, 1],
    }
    return make_study(tmp_path, params)


def key(study: Study, *unit: Any) -> str:
    return unit_key(study, Unit(*unit))


def test_who_is_whose_twin(study: Study) -> None:
    assert key(study, "t", "ridge", "a", 0) == key(study, "t", "ridge", "a", 1)
    assert key(study, "t", "unet2d", "a", 0) == key(study, "u", "unet2d", "a", 0)
    different = [
        ("t", "ridge", "a", 0),
        ("t", "ridge", "paired", 0),
        ("u", "ridge", "a", 0),
        ("t", "knn", "a", 0),
        ("t", "knn", "a", 1),
        ("t", "frozen", "a", 0),
        ("t", "frozen", "a", 1),
        ("t", "unet2d", "a", 0),
        ("t", "unet2d", "a", 1),
        ("t", "unet2d", "paired", 0),
        ("wide", "unet2d", "a", 0),
    ]
    assert len({key(study, *unit) for unit in different}) == len(different)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("t", "ridge", "a", 0), ("t", "ridge", "a", 1)),
        (("t", "unet2d", "a", 0), ("u", "unet2d", "a", 0)),
    ],
)
def test_a_twin_is_copied_under_its_own_name_and_not_trained(
    study: Study, monkeypatch, capsys, first, second
) -> None:
    one, other = Unit(*first), Unit(*second)
    trained = train_unit(study, one)
    with monkeypatch.context() as patch:
        for work in ("fit", "fit_at_once", "score"):
            patch.setattr(f"emadapt.training.train.{work}", lambda *_: pytest.fail("trained again"))
        copied = train_unit(study, other)
    assert f"{one.name} is the same model: copied" in capsys.readouterr().out
    for file in ("model.safetensors", "history.json"):
        assert (copied / file).read_bytes() == (trained / file).read_bytes()
    card, original = (
        json.loads((folder / "model.json").read_text()) for folder in (copied, trained)
    )
    assert (card["unit"], card["settings"]) == (other.name, study.describe(other))
    assert (card["val"], card["best_epoch"]) == (original["val"], original["best_epoch"])
    assert 0 <= json.loads(evaluate_unit(study, other).read_text())["test"]["a"]["iou"] <= 1


def test_a_damaged_or_half_written_neighbour_is_no_twin(tmp_path: Path) -> None:
    for name, text in (
        ("broken", "{"),
        ("list", "[]"),
        ("other", '{"key": "k2", "unit": "other"}'),
        ("me", '{"key": "k", "unit": "me"}'),
        (".half.part", '{"key": "k", "unit": "half"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(text)
    assert twins.find(tmp_path, "k", "me") is None
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin/model.json").write_text('{"key": "k", "unit": "twin"}')
    assert twins.find(tmp_path, "k", "me") == tmp_path / "twin"
