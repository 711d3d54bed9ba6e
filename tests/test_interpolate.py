"""Weights between a fine-tuned unit and the frozen one that it began with."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emadapt.errors import ConfigError
from emadapt.models.regimes import State, merge
from emadapt.models.segmenter import Segmenter, build_segmenter
from emadapt.study.study import BackboneSettings, RegimeSettings, Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.interpolate import interpolate
from emadapt.training.train import train_unit
from tiny import make_study, settings

KINDS = {
    "lora": {"rank": 3},
    "lora_last_k": {"rank": 3, "k": 2},
    "dora": {"rank": 3},
    "bitfit": {},
    "full": {},
}
LORA = {"kind": "lora", "rank": 2, "alpha": 4}


def fresh(kind: str, head: str = "pyramid") -> Segmenter:
    return copy.deepcopy(_built(kind, head))


@functools.cache
def _built(kind: str, head: str) -> Segmenter:
    regime = RegimeSettings(kind, alpha=5.0, **KINDS.get(kind, {}))  # type: ignore[arg-type]
    return build_segmenter(BackboneSettings("tiny_dinov2", "random"), regime, head, 0).eval()


def noisy(segmenter: Segmenter, seed: int) -> State:
    """As after training: everything that can be trained is elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    state = segmenter.trained_state()
    noise = {
        k: 0.1 * torch.randn(v.shape, generator=generator)
        for k, v in state.items()
        if v.is_floating_point()
    }
    return {k: v + noise[k].abs() if k in noise else torch.tensor(seed) for k, v in state.items()}


@torch.inference_mode()
def logits(segmenter: Segmenter) -> torch.Tensor:
    images = torch.rand((2, 1, 42, 56), generator=torch.Generator().manual_seed(1))
    return torch.as_tensor(segmenter(images, (42, 56)))


def merged(segmenter: Segmenter, state: State) -> dict[str, torch.Tensor]:
    """Every weight of the model, adapters merged, by the names of the plain backbone."""
    segmenter.load_trained(state)
    merge(segmenter.backbone)
    named = {**dict(segmenter.backbone.vit.named_parameters()), **segmenter.head.state_dict()}
    return {
        k.replace(".base_layer", ""): v.detach().clone()
        for k, v in named.items()
        if ".lora_" not in k
    }


@pytest.mark.parametrize("head", ["pyramid", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_merged_weight_is_the_mean_of_the_two_models(kind: str, head: str) -> None:
    tuned, probed = noisy(fresh(kind, head), 2), noisy(fresh("frozen", head), 3)
    ends = merged(fresh("frozen", head), probed), merged(fresh(kind, head), tuned)
    assert sum(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0]) > 6
    for share in (0.5, 0.3):
        found = merged(fresh(kind, head), interpolate(fresh(kind, head), tuned, probed, share))
        assert found.keys() == ends[0].keys() == ends[1].keys()
        for name, value in found.items():
            if value.is_floating_point():
                expected = (1 - share) * ends[0][name] + share * ends[1][name]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_ends_stand_the_frozen_unit_and_the_source(kind: str) -> None:
    tuned, probed = noisy(fresh(kind), 2), noisy(fresh("frozen"), 3)
    frozen, source = fresh("frozen"), fresh(kind)
    frozen.load_trained(probed)
    source.load_trained(tuned)
    assert (logits(frozen) - logits(source)).abs().mean() > 0.01
    for share, end in ((0.0, frozen), (1.0, source)):
        model = fresh(kind)
        model.load_trained(interpolate(fresh(kind), tuned, probed, share))
        torch.testing.assert_close(logits(model), logits(end), rtol=1e-4, atol=1e-5)


def params(**regimes: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2, augment=False)
    wise = {f"wise{n}": LORA | {"init_from": "lora", "interpolate": n / 100} for n in (0, 50, 100)}
    own["regimes"] = {
        "frozen": {"kind": "frozen"},
        "lora": LORA | {"init_from": "frozen"},
        "plain": LORA,
        **wise,
        **regimes,
    }
    own["study"] |= {"regimes": list(own["regimes"]), "train_sets": ["a"]}
    return own


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    return make_study(tmp_path, params())


def test_a_study_trains_the_two_ends_and_nothing_between(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wise = {n: Unit("t", f"wise{n}", "a", 0) for n in (50, 0, 100)}
    first = train_unit(study, wise[50])  # its source and the source's are not there yet
    assert "0.5 of the way from t-frozen-a-0 to t-lora-a-0, not trained" in capsys.readouterr().out
    ends = {name: train_unit(study, Unit("t", name, "a", 0)) for name in ("frozen", "lora")}
    tensors = {name: load_file(folder / "model.safetensors") for name, folder in ends.items()}
    with monkeypatch.context() as patch:
        patch.setattr("emadapt.training.fit._step", lambda *_: pytest.fail("trained again"))
        folders = {50: first, **{n: train_unit(study, wise[n]) for n in (0, 100)}}
    for n, folder in folders.items():
        for name, value in load_file(folder / "model.safetensors").items():
            lora, share = tensors["lora"][name], n / 100
            if name.startswith("head."):
                torch.testing.assert_close(
                    value,
                    share * lora + (1 - share) * tensors["frozen"][name],
                    rtol=1e-5,
                    atol=1e-7,
                )
            else:
                torch.testing.assert_close(value, lora * (share if "lora_B" in name else 1.0))
    card, other = (
        json.loads((folder / "model.json").read_text()) for folder in (folders[100], ends["lora"])
    )
    assert card["val"] == other["val"]
    cost, history = (
        json.loads((folder / "history.json").read_text()) for folder in (ends["lora"], first)
    )
    assert history["epochs"] == []
    assert history["seconds"] == cost["seconds"] > 0  # what it took to have it
    assert (
        json.loads(evaluate_unit(study, wise[50]).read_text())["train_seconds"] == cost["seconds"]
    )


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            LORA | {"init_from": "lora", "interpolate": 1.5},
            r"interpolate: found 1\.5; expected a share from 0",
        ),
        (LORA | {"init_from": "lora", "interpolate": -0.5}, r"found -0\.5; expected a share"),
        (LORA | {"interpolate": 0.5}, "init_from ''; expected the name of a regime"),
        (
            LORA | {"init_from": "lora-a", "interpolate": 0.5},
            "init_from 'lora-a'; expected the name of a regime",
        ),
        (LORA | {"init_from": "models/mine", "interpolate": 0.5}, "expected the name of a regime"),
        (
            LORA | {"init_from": "plain", "interpolate": 0.5},
            "which starts from pretrained weights alone; expected one that starts",
        ),
        (
            LORA | {"init_from": "wise50", "interpolate": 0.5},
            "which starts from lora; expected one that starts from a frozen",
        ),
        (
            {"kind": "frozen", "init_from": "frozen", "interpolate": 0.5},
            "nothing of the backbone is adapted under kind frozen",
        ),
        (
            {"kind": "unet2d", "interpolate": 0.5},
            "nothing of the backbone is adapted under kind unet2d",
        ),
        (
            LORA | {"init_from": "lora", "interpolate": 0.5, "epochs": 2, "align": "coral"},
            "and epochs, align; interpolated weights",
        ),
        (LORA | {"init_from": "lora", "interpolate": 0.5, "rank": 3}, "whose adapter is another"),
        (
            LORA | {"init_from": "lora", "interpolate": 0.5, "head": "linear"},
            "whose head is pyramid; expected linear",
        ),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, own: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_study(tmp_path, params(bad=own), ingested=False)
