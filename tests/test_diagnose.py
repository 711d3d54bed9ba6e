"""The stage diagnose on tiny studies: what the file has, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emadapt.domains import compare
from emadapt.domains.features import Features
from emadapt.domains.moments import Moments, slice_moments
from emadapt.domains.run import diagnose
from emadapt.errors import InputError
from emadapt.models.tokens import run
from emadapt.study.training import DiagnoseSettings
from emadapt.training.train import train_unit
from tiny import make_study

OWN = DiagnoseSettings(blocks=4, tokens=2000, permutations=19, replicates=10)


def gaussian(name: str, shift: float, slices: int, seed: int, drift: float = 0.0) -> Features:
    """Tokens (150 a slice, D = 8) around `shift`; the mean drifts along z."""
    rng = np.random.default_rng(seed)
    tokens = [
        rng.normal(shift + drift * z / slices, 1, (150, 8)).astype(np.float32)
        for z in range(slices)
    ]
    columns = zip(*(slice_moments(own) for own in tokens), strict=True)
    at = np.repeat(np.arange(slices), 150)
    return Features(
        name,
        np.arange(slices),
        np.asarray(["train"] * slices),
        Moments(*(np.stack(column) for column in columns)),
        np.concatenate(tokens),
        np.zeros(len(at), np.uint8),
        at,
        np.zeros((len(at), 2), np.float32),
    )


def test_the_same_population_reads_as_same_and_another_as_different():
    a, same, other = (
        gaussian("a", 0, 12, 0),
        gaussian("same", 0, 12, 1),
        gaussian("other", 0.5, 12, 2),
    )
    for level in ("token", "image"):
        near, far = (compare.compare(a, b, level, OWN) for b in (same, other))
        assert near["reads_as"] == "same", level
        assert far["reads_as"] == "different", level
        assert near["frechet"] < near["null"] < far["frechet"]
        assert far["ci95"][0] <= far["frechet"]
        # |shift|^2 = 8 * 0.25 = 2 for infinitely many tokens; the extrapolation takes off what
        # sampling adds.
        assert abs(far["frechet_inf"] - 2) < 0.3
        assert abs(near["frechet_inf"]) < 0.3
        assert far["probe"]["balanced_accuracy"] > near["probe"]["balanced_accuracy"]
    token_level = compare.compare(a, same, "token", OWN)
    assert token_level["probe"]["p_value"] > 0.05
    assert token_level["knn_mixing"] == pytest.approx(1, abs=0.1)


def test_drift_along_z_is_in_the_null():
    """A volume whose ends differ is far from itself: its contiguous halves are in the null."""
    steady, drifting = (
        compare.split_half_null(gaussian("a", 0, 12, 0, drift), "token", OWN) for drift in (0, 1)
    )
    assert drifting > 1.5 > 10 * steady


@pytest.fixture
def study(tmp_path, tracking_off):
    study = make_study(tmp_path)
    for name in study.datasets:
        run(study, "t", name)
    return study


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return dict(json.loads(text))


def test_a_frozen_backbone(study):
    found = read(diagnose(study, "t", "frozen"))
    assert [e["level"] for e in found["pairs"]] == ["token", "image"]
    assert all((e["a"], e["b"], e["model"]) == ("a", "b", "pretrained") for e in found["pairs"])
    assert len(found["segmentation"]) == 4
    shares = found["pca"]["explained_variance"]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1
    controls = found["controls"]
    assert len(controls["random"]) == len(controls["pixels"]) == 1
    pictures = sorted(p.name for p in Path("reports/domain/t-frozen").iterdir())
    assert pictures == ["distances.png", "pca.png"]


@pytest.mark.slow
def test_adapted_models_one_by_one(study):
    with pytest.raises(InputError, match=r"no model.*dvc repro train"):
        diagnose(study, "t", "lora")
    for unit in study.units():
        if unit.regime == "lora":
            train_unit(study, unit)
    found = read(diagnose(study, "t", "lora"))
    assert {e["model"] for e in found["pairs"]} == {"t-lora-a-0", "t-lora-paired-0"}
    assert not found["controls"]
    assert not list(Path("scratch").glob("tmp*"))  # what moments took
