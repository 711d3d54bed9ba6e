"""The stage diagnose on tiny studies: what the file has, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from emadapt.data.ingest import ingest
from emadapt.domains import compare, token_sources
from emadapt.domains.features import Features
from emadapt.domains.moments import Moments, slice_moments
from emadapt.domains.run import diagnose
from emadapt.errors import InputError
from emadapt.models.tokens import run
from emadapt.study.study import Study
from emadapt.study.training import DiagnoseSettings
from emadapt.training.train import train_unit
from tiny import make_study

OWN = DiagnoseSettings(blocks=4, tokens=2000, permutations=19, replicates=10)


def gaussian(name: str, shift: float, slices: int, seed: int, drift: float = 0.0) -> Features:
    """Tokens (150 a slice, D = 8) around `shift`, a fifth foreground; the mean drifts along z."""
    rng = np.random.default_rng(seed)
    tokens = [
        rng.normal(shift + drift * z / slices, 1, (150, 8)).astype(np.float32)
        for z in range(slices)
    ]
    classes = [np.arange(150) % 5 == 0 for _ in tokens]
    moments = Moments(
        *(np.stack(c) for c in zip(*map(slice_moments, tokens, classes), strict=True))
    )
    parts = np.asarray(["train"] * (slices // 2) + ["val"] + ["test"] * (slices - slices // 2 - 1))
    at = np.repeat(np.arange(slices), 150)
    return Features(
        name,
        np.arange(slices),
        parts,
        moments,
        np.concatenate(tokens),
        np.concatenate(classes),
        at,
        np.zeros((len(at), 2), np.float32),
        shown=0,
        grid=np.zeros((1, 150, 8), np.float16),
    )


def test_the_same_population_reads_as_same_and_another_as_different() -> None:
    a, same, other = (
        gaussian("a", 0, 12, 0),
        gaussian("same", 0, 12, 1),
        gaussian("other", 0.5, 12, 2),
    )
    for level, cls in (("token", "all"), ("token", "foreground"), ("image", "all")):
        near, far = (compare.compare(a, b, level, cls, OWN) for b in (same, other))
        assert near["reads_as"] == "same", (level, cls)
        assert far["reads_as"] == "different", (level, cls)
        assert near["frechet"] < near["null"] < far["frechet"]
        assert far["ci95"][0] <= far["frechet"]
        # |shift|^2 = 8 * 0.25 = 2 for infinitely many tokens; the extrapolation takes off what
        # sampling adds.
        assert abs(far["frechet_inf"] - 2) < 0.3
        assert abs(near["frechet_inf"]) < 0.3
        assert far["probe"]["balanced_accuracy"] > near["probe"]["balanced_accuracy"]
    token_level = compare.compare(a, same, "token", "all", OWN)
    assert token_level["probe"]["p_value"] > 0.05
    assert token_level["knn_mixing"] == pytest.approx(1, abs=0.1)


def test_pairs_with_one_dataset_alone() -> None:
    found = {name: gaussian(name, 0, 4, 0) for name in "bac"}
    pairs = compare.pairs(found, OWN.changed(against="a"))
    assert {(one.name, other.name) for one, other in pairs} == {("b", "a"), ("a", "c")}
    assert len(compare.crossings(found, OWN.changed(against="a"))) == 4 + 3
    assert len(compare.pairs(found, OWN)) == 3


def test_drift_along_z_is_in_the_null() -> None:
    """A volume whose ends differ is far from itself: its contiguous halves are in the null."""
    steady, drifting = (
        compare.split_half_null(gaussian("a", 0, 12, 0, drift), "token", "all", OWN)
        for drift in (0, 1)
    )
    assert drifting > 1.5 > 10 * steady


def test_a_class_in_too_few_slices_is_refused() -> None:
    b = gaussian("b", 0, 12, 1)
    few = gaussian("few", 0, 12, 2)
    few.foreground[few.at > 2] = False
    with pytest.raises(
        InputError, match=r"dataset few: found foreground tokens in 3 slices.*at least 4"
    ):
        compare.compare(few, b, "token", "foreground", OWN)


def test_a_class_in_fewer_slices_than_blocks_is_compared_on_those() -> None:
    own = OWN.changed(blocks=8)
    a, b = gaussian("a", 0, 12, 0), gaussian("b", 2, 12, 1)
    for places, enough in (
        (np.arange(12) % 2 > 0, True),
        (np.arange(12) < 2, False),
    ):  # 6 slices, and one block of 2
        lacking = ~places
        a.foreground[np.isin(a.at, np.flatnonzero(lacking))] = False
        for whole in (a.moments.count, a.moments.total, a.moments.outer):
            whole[lacking, 1] = 0
        assert compare.measurable(a, "foreground", own) == enough
        if enough:
            found = compare.compare(a, b, "token", "foreground", own)
            assert found["reads_as"] == "different"
            assert found["ci95"][0] <= found["frechet"] <= found["ci95"][1] < 10 * found["frechet"]


def test_few_slices_with_foreground_do_not_end_the_stage(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "FEWEST", 100)
    found = read(diagnose(study, "t", "frozen"))
    assert {(e["level"], e["class"]) for e in found["pairs"]} == {
        ("token", "all"),
        ("image", "all"),
    }
    assert not found["segmentation"]
    assert "a has background and foreground in too few of its 8 slices" in capsys.readouterr().err


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    study = make_study(tmp_path)
    for name in study.datasets:
        run(study, "t", name)
    return study


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return dict(json.loads(text))


def test_a_frozen_backbone(study: Study) -> None:
    found = read(diagnose(study, "t", "frozen"))
    assert {(e["level"], e["class"]) for e in found["pairs"]} == {
        ("token", "all"),
        ("token", "foreground"),
        ("token", "background"),
        ("image", "all"),
    }
    assert all((e["a"], e["b"], e["model"]) == ("a", "b", "pretrained") for e in found["pairs"])
    assert len(found["segmentation"]) == 4
    shares = found["pca"]["explained_variance"]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1
    controls = found["controls"]
    assert len(controls["random"]) == len(controls["pixels"]) == 1
    pictures = sorted(p.name for p in Path("reports/domain/t-frozen").iterdir())
    assert pictures == ["distances.png", "maps.png", "pca.png"]


@pytest.mark.slow
def test_adapted_models_one_by_one_and_a_second_run_reads_what_was_kept(
    study: Study, monkeypatch
) -> None:
    with pytest.raises(InputError, match=r"no model.*dvc repro train"):
        diagnose(study, "t", "lora")
    for unit in study.units():
        if unit.regime == "lora":
            train_unit(study, unit)
    first = read(diagnose(study, "t", "lora"))
    assert {e["model"] for e in first["pairs"]} == {"t-lora-a-0", "t-lora-paired-0"}
    assert not first["controls"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokens were computed again")

    monkeypatch.setattr(token_sources, "compute_tokens", refuse)
    again = read(diagnose(study, "t", "lora"))
    assert first == again


def test_of_labels_that_are_too_small_for_a_patch_nothing_is_said_but_that(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = np.zeros((10, 90, 100), np.uint8)
    label[:, 40:44, 40:44] = 1
    tifffile.imwrite(tmp_path / "data/a/label.tif", label, photometric="minisblack")
    ingest(study, "a", tmp_path / "data", tmp_path / "build/ingest")
    run(study, "t", "a")
    found = read(diagnose(study, "t", "frozen"))
    assert {e["class"] for e in found["pairs"]} == {"all", "background"}
    assert [(e["train"], e["test"]) for e in found["segmentation"]] == [("b", "b")]
    assert "a has foreground in too few" in capsys.readouterr().err
