"""A unit that starts from another one's model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emadapt.errors import ConfigError, InputError
from emadapt.models.segmenter import load_segmenter
from emadapt.study.study import Study, Unit, load_study
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.plan import unit_key
from emadapt.training.train import prepare, train_unit
from tiny import make_study, settings

TUNED = {"kind": "lora", "rank": 2, "alpha": 4}


def params(**regimes: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2)
    own["regimes"] |= {
        "from_b": TUNED | {"init_from": "lora-b"},
        "lpft": TUNED | {"init_from": "frozen"},
        **regimes,
    }
    own["train_sets"]["b"] = ["b"]
    own["study"] |= {"regimes": list(own["regimes"]), "train_sets": ["a", "b"]}
    return own


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    return make_study(tmp_path, params())


def start_of(study: Study, *unit: Any) -> dict[str, torch.Tensor]:
    return prepare(study, Unit(*unit)).segmenter.trained_state()


def test_it_starts_from_the_other_ones_weights_and_goes_on(study: Study) -> None:
    source = load_file(train_unit(study, Unit("t", "lora", "b", 0)) / "model.safetensors")
    start = start_of(study, "t", "from_b", "a", 0)
    assert set(start) == set(source)
    assert all(torch.equal(start[name], value) for name, value in source.items())
    tuned = load_file(train_unit(study, Unit("t", "from_b", "a", 0)) / "model.safetensors")
    assert any(not torch.equal(tuned[name], value) for name, value in source.items())
    assert json.loads(evaluate_unit(study, Unit("t", "from_b", "a", 0)).read_text())["test"]["a"][
        "n"
    ]


def test_a_frozen_head_and_fresh_adapters_linear_probing_then_fine_tuning(study: Study) -> None:
    head = load_file(train_unit(study, Unit("t", "frozen", "a", 0)) / "model.safetensors")
    start, fresh = start_of(study, "t", "lpft", "a", 0), start_of(study, "t", "lora", "a", 0)
    for name, value in start.items():
        assert torch.equal(value, head[name] if name.startswith("head.") else fresh[name]), name
    assert any(name.startswith("adapter.") for name in start)


def test_a_source_that_was_not_trained_is_trained_and_later_found(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = train_unit(study, Unit("t", "from_b", "a", 0)) / "model.safetensors"
    first = untrained.read_bytes()
    assert not Path("build/units/t-lora-b-0").exists()
    with monkeypatch.context() as patch:
        patch.setattr("emadapt.training.fit._step", lambda *_: pytest.fail("trained again"))
        train_unit(study, Unit("t", "lora", "b", 0))  # finds its finished checkpoint
    for folder in ("scratch/units", "build/units/t-from_b-a-0"):
        shutil.rmtree(folder)
    assert (
        train_unit(study, Unit("t", "from_b", "a", 0)) / "model.safetensors"
    ).read_bytes() == first


def test_what_starts_elsewhere_is_another_model_and_other_keys_stay(study: Study) -> None:
    def key(study: Study, regime: str) -> str:
        return unit_key(study, Unit("t", regime, "a", 0))

    keys = {regime: key(study, regime) for regime in ("lora", "from_b", "lpft")}
    assert len(set(keys.values())) == 3
    changed = params(lora=TUNED | {"adapter_lr": 0.01})
    again = make_study(Path("other"), changed, ingested=False)
    assert key(again, "from_b") != keys["from_b"], "its source is another"
    assert key(again, "lpft") == keys["lpft"]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (TUNED | {"init_from": "nothing"}, "found 'nothing'; expected REGIME or REGIME-TRAIN_SET"),
        (TUNED | {"init_from": "lora-c"}, "found 'lora-c'; expected REGIME"),
        (TUNED | {"init_from": "bad"}, "leads back to 'bad'"),
        (TUNED | {"init_from": "lora-a", "rank": 3}, "whose adapter is another"),
        (
            TUNED | {"init_from": "lora-a", "head": "linear"},
            "whose head is pyramid; expected linear",
        ),
        ({"kind": "frozen", "init_from": "lora-a"}, "whose adapter is another"),
        ({"kind": "ridge", "init_from": "frozen"}, "takes its weights from elsewhere"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, own: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_study(tmp_path, params(bad=own), ingested=False)


def test_a_folder_and_what_is_wrong_with_it(study: Study, tmp_path: Path) -> None:
    trained = train_unit(study, Unit("t", "lora", "b", 0))
    shutil.copytree(trained, "models/mine")

    def starting(**changes: Any) -> dict[str, torch.Tensor]:
        own = params(mine=TUNED | {"init_from": "models/mine"} | changes)
        own["backbones"]["other"] = own["backbones"]["t"] | {"arch": "tiny_dinov3"}
        (tmp_path / "params.yaml").write_text(json.dumps(own))
        backbone = "other" if changes.get("epochs") else "t"
        return start_of(load_study(tmp_path / "params.yaml"), backbone, "mine", "a", 0)

    segmenter, _ = load_segmenter(trained)
    assert all(torch.equal(v, segmenter.trained_state()[k]) for k, v in starting().items())
    with pytest.raises(InputError, match="found a model of backbone tiny_dinov2"):
        starting(epochs=1)
    with pytest.raises(InputError, match="found a head pyramid; expected linear"):
        starting(head="linear")
    with pytest.raises(InputError, match=r"found an adapter .*'rank': 2.*; expected .*'rank': 3"):
        starting(rank=3)
    with pytest.raises(InputError, match="no model that can be read"):
        starting(init_from="models/none")
    Path("models/mine/model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(InputError, match="no model that can be read"):
        starting()
