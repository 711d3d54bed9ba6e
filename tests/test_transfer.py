"""IoU lost against distance: the points, the distances they take, and the rank correlation by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from emadapt.errors import InputError
from emadapt.report.transfer import (
    DISTANCES,
    domain_vs_iou,
    rank_correlation,
    read_domain,
    relative,
)
from fakes import a_card, a_study, iou_of, pair_entry, transfer_study, write_domain


def entries(study):
    return [
        {
            "backbone": "dinov2_s",
            "regime": u.regime,
            "train_set": u.train_set,
            "test_set": d,
            "iou": {"mean": iou_of(study, u, d)},
        }
        for u in study.units()
        for d in study.datasets
    ]


def test_points_and_their_distances(tmp_path):
    study = a_study(seeds=(0, 1))
    write_domain(tmp_path, study)
    joined = domain_vs_iou(study, entries(study), read_domain(tmp_path, study))
    points = {(p["regime"], p["a"], p["b"]): p for p in joined["points"]}
    assert set(points) == set(itertools.product(("frozen", "lora"), *[("lucchi", "vnc")] * 2)) - {
        (regime, name, name) for regime in ("frozen", "lora") for name in ("lucchi", "vnc")
    }
    for point in points.values():
        assert point["loss"] == pytest.approx(0.6)  # fakes.iou_of: 0.8 trained on, 0.2 not
        assert set(point["distances"]) == set(DISTANCES)
    frozen, lora = (
        points["frozen", "lucchi", "vnc"]["distances"],
        points["lora", "vnc", "lucchi"]["distances"],
    )
    assert frozen["fd_token"] == 0.41
    assert frozen["fd_token_foreground"] == pytest.approx(0.51)
    assert frozen["fd_token_background"] == pytest.approx(0.61)
    assert frozen["fd_image"] == pytest.approx(0.71)
    assert frozen["fd_token_inf"] == pytest.approx(0.9 * 0.41)
    assert (frozen["knn_unmixing"], frozen["probe"], frozen["mmd2"]) == (0.98, 0.99, 0.3)
    assert (frozen["outlier_auroc"], frozen["knn_iou_loss"]) == (0.8, 0.5)  # from lucchi to vnc
    # Models 2 and 3 of the regime are the two seeds trained on vnc.
    assert lora["fd_token"] == pytest.approx(np.mean([0.41 - 0.06, 0.41 - 0.09]))
    assert lora["outlier_auroc"] == pytest.approx(np.mean([0.92, 0.93]))
    assert lora["knn_iou_loss"] == pytest.approx(1 - np.mean([0.38, 0.37]))


def test_points_are_of_models_that_never_saw_the_other_datasets_labels_and_of_right_labels():
    study = transfer_study((0,))
    seen = {
        (p["regime"], p["a"], p["b"]) for p in domain_vs_iou(study, entries(study), {})["points"]
    }
    assert ("from_lucchi", "lucchi", "vnc") in seen
    assert ("from_lucchi", "vnc", "lucchi") not in seen
    assert ("lpft", "vnc", "lucchi") in seen  # it starts from a head of its own training set
    study = a_study(seeds=(0,))
    wrong = study.dataset_settings["lucchi"].changed(pairing="lexicographic")
    study = dataclasses.replace(study, dataset_settings=study.dataset_settings | {"lucchi": wrong})
    assert domain_vs_iou(study, entries(study), {})["points"] == []


def test_without_diagnose_there_are_points_and_reasons():
    study = a_study(seeds=(0,))
    joined = domain_vs_iou(study, entries(study), {})
    assert len(joined["points"]) == 4
    for found in joined["correlations"].values():
        assert (found["rho"], found["p_value"], found["n"]) == (None, None, 0)
        assert "at least 4" in found["reason"]


@pytest.mark.parametrize("n", [4, 5, 6])
def test_rank_correlation_by_brute_force(n):
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 4, n).astype(float), rng.random(n)  # x has ties

    def ranks(values):
        return np.array([(np.sum(values < v) + np.sum(values <= v) + 1) / 2 for v in values])

    def rho(order):
        return np.corrcoef(ranks(x)[list(order)], ranks(y))[0, 1]

    everything = np.array([rho(order) for order in itertools.permutations(range(n))])
    found = rank_correlation(list(x), list(y))
    here = rho(range(n))
    tails = [(everything >= here - 1e-9).mean(), (everything <= here + 1e-9).mean()]
    assert found["rho"] == pytest.approx(here, abs=1e-6)
    assert found["p_value"] == pytest.approx(min(1, 2 * min(tails)), abs=1e-6)
    assert (found["n"], found["reason"]) == (n, None)


def test_no_correlation_of_few_or_constant_values():
    assert rank_correlation([1, 2, 3, None], [1, 2, 3, 4]) == {
        "rho": None,
        "p_value": None,
        "n": 3,
        "reason": "3 of at least 4 points",
    }
    for x, y in (([1] * 5, list(range(5))), (list(range(5)), [1] * 5)):
        found = rank_correlation(x, y)
        assert (found["rho"], found["reason"]) == (None, "all values are the same")


def test_relative_is_in_units_of_the_trace():
    entry = pair_entry(frechet=40.0)
    assert relative(entry, entry["null"]) == pytest.approx(0.1)  # fakes: the mean trace is 100
    assert relative(entry, None) is None
    assert relative(entry | {"frechet": 0.0}, 1.0) is None


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "no JSON"),
        ("[]", "no backbone, outliers"),
        (json.dumps({**a_card(a_study(), "lora"), "study": "another"}), "study another"),
        (json.dumps(a_card(a_study(), "frozen")), "those of dinov2_s, frozen"),
    ],
)
def test_diagnostics_that_do_not_fit(tmp_path, content, found):
    study = a_study()
    write_domain(tmp_path, study)
    (tmp_path / "reports/domain/dinov2_s-lora.json").write_text(content)
    with pytest.raises(InputError, match=found) as error:
        read_domain(tmp_path, study)
    assert "dinov2_s-lora.json" in str(error.value)
