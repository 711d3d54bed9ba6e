"""A unit that starts from another one's model, or from a model in a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emadapt.errors import InputError
from emadapt.study.loading import load_study
from emadapt.study.study import Study, Unit
from emadapt.training.fit import Run
from emadapt.training.plan import unit_key
from emadapt.training.prepare import prepare
from emadapt.training.train import train_unit
from tiny import make_study, same_tensors, settings, trained, write_model

TUNED = {"kind": "lora", "rank": 2, "alpha": 4}
START = "warm_start"


def params(**regimes: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2)
    own["regimes"] |= {
        "from_b": TUNED | {START: "lora-b"},
        "lpft": TUNED | {START: "frozen"},
        **regimes,
    }
    own["train_sets"]["b"] = ["b"]
    own["study"] |= {"regimes": list(own["regimes"]), "train_sets": ["a", "b"]}
    return own


@pytest.fixture
def study(tmp_path, tracking_off):
    return make_study(tmp_path, params())


def start_of(study: Study, *unit: Any) -> dict[str, torch.Tensor]:
    return prepare(study, Unit(*unit)).segmenter.trained_state()


def test_it_starts_from_the_other_ones_weights_and_goes_on(study):
    source = load_file(train_unit(study, Unit("t", "lora", "b", 0)) / "model.safetensors")
    assert same_tensors(start_of(study, "t", "from_b", "a", 0), source)
    tuned = load_file(train_unit(study, Unit("t", "from_b", "a", 0)) / "model.safetensors")
    assert not same_tensors(tuned, source)


def test_a_frozen_head_and_fresh_adapters_linear_probing_then_fine_tuning(study):
    head = load_file(train_unit(study, Unit("t", "frozen", "a", 0)) / "model.safetensors")
    start, fresh = start_of(study, "t", "lpft", "a", 0), start_of(study, "t", "lora", "a", 0)
    for name, value in start.items():
        assert torch.equal(value, head[name] if name.startswith("head.") else fresh[name]), name
    assert any(name.startswith("adapter.") for name in start)


def test_a_source_that_was_not_trained_is_trained_and_later_found(study, monkeypatch):
    first = trained(study, Unit("t", "from_b", "a", 0))
    assert not Path("build/units/t-lora-b-0").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "epoch", lambda *_: pytest.fail("trained again"))
        train_unit(study, Unit("t", "lora", "b", 0))  # finds its finished checkpoint
    for folder in ("scratch/units", "build/units/t-from_b-a-0"):
        shutil.rmtree(folder)
    again = train_unit(study, Unit("t", "from_b", "a", 0)) / "model.safetensors"
    assert again.read_bytes() == first


def test_what_starts_elsewhere_is_another_model_and_other_keys_stay(study):
    def key(study: Study, regime: str) -> str:
        return unit_key(study, Unit("t", regime, "a", 0))

    keys = {regime: key(study, regime) for regime in ("lora", "from_b", "lpft")}
    assert len(set(keys.values())) == 3
    changed = params(lora=TUNED | {"adapter_lr": 0.01})
    again = make_study(Path("other"), changed, ingested=False)
    assert key(again, "from_b") != keys["from_b"], "its source is another"
    assert key(again, "lpft") == keys["lpft"]


def test_a_folder_and_what_is_wrong_with_it(study, tmp_path):
    trained = train_unit(study, Unit("t", "lora", "b", 0))
    shutil.copytree(trained, "models/mine")

    def starting(backbone: str = "t", **changes: Any) -> dict[str, torch.Tensor]:
        own = params(mine=TUNED | {START: "models/mine"} | changes)
        own["backbones"]["other"] = own["backbones"]["t"] | {"arch": "tiny_dinov3"}
        own["study"]["backbones"] = ["t", "other"]
        (tmp_path / "params.yaml").write_text(json.dumps(own))
        return start_of(load_study(tmp_path / "params.yaml"), backbone, "mine", "a", 0)

    assert same_tensors(starting(), load_file(trained / "model.safetensors"))
    for changes, words in (
        ({"backbone": "other"}, "found a model of backbone tiny_dinov2"),
        ({"head": "linear"}, "found a head pyramid; expected linear"),
        ({"rank": 3}, r"found an adapter .*'rank': 2.*; expected .*'rank': 3"),
        ({START: "models/none"}, "no model that can be read"),
    ):
        with pytest.raises(InputError, match=words):
            starting(**changes)
    write_model(Path("models/two"), head="pyramid", classes=("membrane", "vesicle"))
    own = params(mine={"kind": "frozen", START: "models/two"})
    own["backbones"]["t"]["blocks"] = "last"
    (tmp_path / "params.yaml").write_text(json.dumps(own))
    with pytest.raises(InputError, match=r"found head\.project\.1\..*the `blocks` of that model"):
        start_of(load_study(tmp_path / "params.yaml"), "t", "mine", "a", 0)
    Path("models/mine/model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(InputError, match="no model that can be read"):
        starting()
