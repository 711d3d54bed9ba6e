"""Ridge and kNN as units: what they choose on, what they leave alone, and how training goes on from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emadapt.models.predict import predict_slice
from emadapt.models.ridge import STRENGTHS
from emadapt.models.segmenter import load_segmenter
from emadapt.models.tokens import TokenView
from emadapt.pipeline.check import check_study
from emadapt.study.study import Study, TrainSettings, Unit
from emadapt.training.closed_form import BANK, EDGES, KS, choose, draw_bank, ridge_path
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import prepare, train_unit
from tiny import make_study, settings

RIDGE, KNN = Unit("t", "ridge", "a", 0), Unit("t", "knn", "a", 0)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def baselines(**regimes: Any) -> dict[str, Any]:
    params = settings(epochs=1, steps_per_epoch=2)
    params["regimes"] |= {"ridge": {"kind": "ridge"}, "knn": {"kind": "knn"}, **regimes}
    params["study"]["regimes"] = list(params["regimes"])
    return params


def a_view(seed: int, slices: int, rows: int = 2) -> TokenView:
    """`rows` tiles of 3 x 3 tokens (D = 5) a slice; the last slice is for testing. Tokens say which slice they are of."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(slices, dtype=np.int32), rows)[:, None] * np.array(
        [1, 0, 0], np.int32
    )
    tokens = rng.normal(size=(len(index), 5, 3, 3)).astype(np.float16)
    tokens[:, 0] = index[:, :1, None]
    labels = (rng.random((len(index), 12, 12)) > 0.6).astype(np.uint8)
    return TokenView(
        tokens, labels, index, {"train": list(range(slices - 1)), "val": [], "test": [slices - 1]}
    )


def test_the_choice_is_the_best_of_all_candidates_and_thresholds() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.random(300) > 0.7, rng.random(500) > 0.8]
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    # Shares lie in the middles of bins, so that thresholds at edges never tie with them.
    shares = [
        [
            middles[
                np.clip(120 + 90 * label + rng.normal(0, noise, len(label)), 0, 399).astype(int)
            ]
            for noise in (90, 30, 60)
        ]
        for label in labels
    ]
    counts = np.array(
        [
            [[np.histogram(s[label == own], EDGES)[0] for own in (False, True)] for s in three]
            for three, label in zip(shares, labels, strict=True)
        ],
        float,
    )

    def iou(candidate: int, threshold: float) -> float:
        found = [three[candidate] > threshold for three in shares]
        return float(
            np.mean(
                [
                    (f & y).sum() / (f | y).sum() if (f | y).any() else 1.0
                    for f, y in zip(found, labels, strict=True)
                ]
            )
        )

    choice = choose(counts)
    everything = np.array([[iou(c, t) for t in EDGES[:-1]] for c in range(3)])
    assert choice.i == 1
    assert iou(choice.i, choice.threshold) == pytest.approx(everything.max())
    np.testing.assert_allclose(choice.table[:, 0], everything.max(1))
    for c, (best, threshold) in enumerate(choice.table):
        assert iou(c, threshold) == pytest.approx(best)

    def loss(slope: float) -> float:
        z = [slope * (three[choice.i] - choice.threshold) for three in shares]
        return float(
            sum(np.logaddexp(0, np.where(y, -v, v)).mean() for v, y in zip(z, labels, strict=True))
        )

    assert loss(choice.slope) <= min(loss(s) for s in np.geomspace(1, 100, 200)) + 1e-5


def test_a_bank_is_spread_over_datasets_and_their_training_slices() -> None:
    views = [[a_view(0, slices=5)], [a_view(1, slices=9)]]
    tokens, foreground = draw_bank(views, seed=0, size=64)
    assert tokens.shape == (64, 5)
    assert np.bincount(tokens[:32, 0].int()).tolist() == [8] * 4
    assert np.bincount(tokens[32:, 0].int()).tolist() == [4] * 8
    labels = (
        views[0][0].labels[:8].reshape(8, 3, 4, 3, 4).mean((2, 4)) >= 0.5
    )  # all tokens of the training slices
    assert torch.equal(
        draw_bank([views[0]], seed=0)[1], torch.from_numpy(labels.astype(np.float32).ravel())
    )
    assert set(foreground.tolist()) == {0, 1}
    again, other = draw_bank(views, seed=0, size=64)[0], draw_bank(views, seed=1, size=64)[0]
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    assert len(draw_bank(views, seed=0, size=BANK)[0]) == 2 * 9 * (4 + 8)  # all there are


def test_datasets_of_a_union_weigh_the_same_where_they_are_balanced() -> None:
    small, large = a_view(0, slices=3), a_view(1, slices=9)
    train = TrainSettings()
    balanced = ridge_path([[small], [large]], train)
    repeated = ridge_path([[small] * 4 + [large]], train)  # 2 and 8 training slices
    np.testing.assert_allclose(balanced.weights, repeated.weights, atol=1e-9)
    plain = ridge_path([[small], [large]], TrainSettings(balanced=False))
    np.testing.assert_allclose(
        plain.weights, ridge_path([[small, large]], train).weights, atol=1e-9
    )
    assert np.abs(plain.weights - balanced.weights).max() > 1e-3


@pytest.mark.parametrize(
    ("unit", "name", "values"), [(RIDGE, "ridge/strength", STRENGTHS), (KNN, "knn/k", KS)]
)
def test_a_unit_is_fitted_evaluated_and_predicts_slices_as_the_cache_does(
    tmp_path: Path, unit: Unit, name: str, values: tuple[float, ...]
) -> None:
    study = make_study(tmp_path, baselines())
    folder = train_unit(study, unit)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "model.json", "history.json"}
    card, history = (json.loads((folder / f"{f}.json").read_text()) for f in ("model", "history"))
    assert [entry[name] for entry in history["epochs"]] == list(values)
    chosen = history["epochs"][card["best_epoch"]]
    assert chosen["val/iou"] == max(entry["val/iou"] for entry in history["epochs"])
    assert card["val"]["iou"] == pytest.approx(
        chosen["val/iou"], abs=0.02
    )  # maps are blended as probabilities, not as shares
    assert (
        card["head"]
        == card["settings"]["train"]["head"]
        == study.regime_settings[unit.regime].own_head
    )
    metrics = json.loads(evaluate_unit(study, unit).read_text())
    assert metrics["test"]["a"]["iou"] > 0.5  # discs of 12 to 20 pixels, patches of 14
    segmenter, _ = load_segmenter(folder)
    image, label = (np.load(f"build/ingest/a/{kind}.npy")[9] for kind in ("image", "label"))
    found = predict_slice(segmenter, image) > 0.5
    iou = (found & (label > 0)).sum() / (found | (label > 0)).sum()
    assert iou == pytest.approx(
        metrics["test"]["a"]["per_slice"]["iou"][-1], abs=0.03
    )  # cached tokens are half precision


@pytest.mark.parametrize("unit", [RIDGE, KNN], ids=lambda u: u.regime)
def test_the_test_slices_are_not_looked_at(tmp_path: Path, unit: Unit) -> None:
    study = make_study(tmp_path, baselines())
    first = (train_unit(study, unit) / "model.safetensors").read_bytes()
    for name in ("image", "label"):  # other test slices, the same md5 in the manifest
        path = tmp_path / f"build/ingest/a/{name}.npy"
        data = bytearray(path.read_bytes())
        data[-90 * 100 * 2 :] = bytes(90 * 100 * 2)
        path.write_bytes(data)
    (tmp_path / "scratch/tokens").rename(tmp_path / "gone")
    assert (train_unit(study, unit) / "model.safetensors").read_bytes() == first


def logits(study: Study, unit: Unit) -> torch.Tensor:
    """Of the segmenter that `unit` is trained from, on an image."""
    segmenter = prepare(study, unit).segmenter.eval()
    with torch.inference_mode():
        return segmenter(
            torch.rand(1, 1, 56, 56, generator=torch.Generator().manual_seed(0)), (56, 56)
        )


def test_patches_that_overlap_have_no_labels_of_their_own(tmp_path: Path) -> None:
    params = baselines(warm={"kind": "lora", "head": "linear", "init": "ridge"})
    params["backbones"]["t"]["stride"] = 7
    make_study(tmp_path, params, ingested=False)
    found = [
        line
        for line in check_study(tmp_path / "params.yaml", tmp_path / "data")
        if "stride: found 7" in line
    ]
    assert {
        name for name in params["regimes"] for line in found if f"; {name} is fitted" in line
    } == {"ridge", "knn", "warm"}


def test_training_starts_at_what_ridge_says(tmp_path: Path) -> None:
    lora = {"kind": "lora", "rank": 2, "alpha": 4, "head": "linear"}
    still = {"kind": "frozen", "head": "linear", "init": "ridge", "head_lr": 1e-9}
    study = make_study(
        tmp_path,
        baselines(
            probe={"kind": "frozen", "head": "linear"},
            warm={**lora, "init": "ridge"},
            cold=lora,
            still=still,
        ),
    )
    segmenter, card = load_segmenter(train_unit(study, RIDGE))
    with torch.inference_mode():
        expected = segmenter(
            torch.rand(1, 1, 56, 56, generator=torch.Generator().manual_seed(0)), (56, 56)
        )
    for regime in ("still", "warm"):
        assert torch.equal(logits(study, Unit("t", regime, "a", 0)), expected)
    for regime in ("probe", "cold"):
        assert (logits(study, Unit("t", regime, "a", 0)) - expected).abs().max() > 0.5
    trained = json.loads((train_unit(study, Unit("t", "still", "a", 0)) / "model.json").read_text())
    assert trained["val"]["iou"] == pytest.approx(
        card["val"]["iou"], abs=0.05
    )  # batch statistics have moved a little
