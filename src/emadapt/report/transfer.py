"""What crossing from one dataset to another costs in IoU, against how far apart the model sees them: domain-vs-iou.json."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.report.comparisons import seen_elsewhere
from emadapt.study.study import Study, Unit

Card = Mapping[str, Any]
"""What diagnose wrote about one backbone and regime."""

DISTANCES = {
    "fd_token": "Fréchet distance of tokens",
    "fd_token_foreground": "Fréchet distance, foreground tokens",
    "fd_token_background": "Fréchet distance, background tokens",
    "fd_token_inf": "Fréchet distance of tokens, n to infinity",
    "fd_image": "Fréchet distance of slices",
    "knn_unmixing": "1 − kNN mixing",
    "probe": "domain probe, balanced accuracy",
    "mmd2": "MMD²",
    "outlier_auroc": "outlier AUROC of b's tokens against a",
    "knn_iou_loss": "1 − IoU of kNN labels, a to b",
}
FEWEST = 4
"""Points below which a rank correlation means nothing: with three, even a perfect order has p = 1/3."""
PERMUTATIONS = 50_000  # exact up to 8! = 40320
MEANING = (
    "the loss of a point a→b is the mean IoU on b of the models trained on b alone minus that of those trained on a alone."
    " Left out: regimes without training, mispaired datasets, and models that started from one that has seen b's labels."
    " Fréchet distances are divided by the mean trace of the two covariances, so that features of different size compare."
    " rho: Spearman's over all points, p two-sided from permutations; points share datasets and models, so p is optimistic."
)


def read_domain(root: Path, study: Study) -> dict[tuple[str, str], Card]:
    """What diagnose wrote under reports/domain, by (backbone, regime); what it has not written is left out.

    Raises:
        InputError: a file is not JSON, lacks what the report needs, or belongs to another study.
    """
    cards = {}
    for backbone in study.backbones:
        for regime in study.regimes:
            file = root / "reports/domain" / f"{backbone}-{regime}.json"
            if not file.is_file():
                continue
            expected, do = (
                f"the diagnostics of {backbone}, {regime}, study {study.name}",
                "Run `dvc repro`, or delete the file.",
            )
            try:
                card = json.loads(file.read_text())
            except ValueError as error:
                raise InputError(
                    file, found=f"no JSON ({error})", expected=expected, do=do
                ) from None
            needed = {"study", "backbone", "regime", "pairs", "segmentation", "outliers"}
            if needed := needed - set(card if isinstance(card, dict) else ()):
                raise InputError(
                    file, found=f"no {', '.join(sorted(needed))}", expected=expected, do=do
                )
            if (card["study"], card["backbone"], card["regime"]) != (study.name, backbone, regime):
                found = f"those of {card['backbone']}, {card['regime']}, study {card['study']}"
                raise InputError(file, found=found, expected=expected, do=do)
            cards[backbone, regime] = card
    return cards


def domain_vs_iou(
    study: Study, entries: Sequence[Mapping[str, Any]], cards: Mapping[tuple[str, str], Card]
) -> dict[str, Any]:
    """Points and rank correlations: a point is backbone x regime x ordered pair (trained on a alone, tested on b).

    Args:
        study: names the training sets; only those of a single dataset make points.
        entries: "units" of the summary.
        cards: from `read_domain`; without one, the points of its backbone and regime have no distances.
    """
    iou = {
        (e["backbone"], e["regime"], e["train_set"], e["test_set"]): e["iou"]["mean"]
        for e in entries
    }
    single: dict[str, str] = {}
    right = {name for name in study.tested if not study.dataset_settings[name].mispaired}
    for name in sorted(
        study.train_sets, key=lambda name: study.train_set_settings[name].few
    ):  # with all labels if there is one
        spec = study.train_set_settings[name]
        if len(spec.datasets) == 1 and not spec.unlabelled and right.issuperset(spec.datasets):
            single.setdefault(spec.datasets[0], name)
    points = []
    trained = [regime for regime in study.regimes if study.regime_settings[regime].trains]
    for backbone, regime in itertools.product(study.backbones, trained):
        frozen = study.regime_settings[regime].on_pretrained_tokens
        for a, b in itertools.permutations(single, 2):
            if b in seen_elsewhere(study, Unit(backbone, regime, single[a], study.seeds[0])):
                continue
            within, across = (iou[backbone, regime, single[trained_on], b] for trained_on in (b, a))
            card = cards.get((backbone, study.tokens_of(regime)))
            points.append(
                {
                    "backbone": backbone,
                    "regime": regime,
                    "a": a,
                    "b": b,
                    "iou_within": within,
                    "iou_across": across,
                    "loss": round(within - across, 6),
                    "distances": distances(card, None if frozen else single[a], a, b)
                    if card
                    else dict.fromkeys(DISTANCES),
                }
            )
    losses = [point["loss"] for point in points]
    correlations = {
        name: {
            "label": label,
            **rank_correlation([point["distances"][name] for point in points], losses),
        }
        for name, label in DISTANCES.items()
    }
    return {"study": study.name, "meaning": MEANING, "points": points, "correlations": correlations}


def distances(card: Card, train_set: str | None, a: str, b: str) -> dict[str, float | None]:
    """How far b is from a for the models trained on `train_set` (mean over seeds; None: the pretrained backbone).

    Returns:
        A value for each of DISTANCES, None where diagnose has none.
    """

    def mine(section: str) -> list[Mapping[str, Any]]:
        return [entry for entry in card[section] if entry["train_set"] == train_set]

    def pair(level: str, kind: str = "all") -> list[Mapping[str, Any]]:
        return [
            e
            for e in mine("pairs")
            if {e["a"], e["b"]} == {a, b} and (e["level"], e["class"]) == (level, kind)
        ]

    def directed(section: str) -> list[Mapping[str, Any]]:
        return [e for e in mine(section) if (e["train"], e["test"]) == (a, b)]

    tokens = pair("token")
    return {
        "fd_token": mean(e.get("relative") for e in tokens),
        "fd_token_foreground": mean(e.get("relative") for e in pair("token", "foreground")),
        "fd_token_background": mean(e.get("relative") for e in pair("token", "background")),
        "fd_token_inf": mean(relative(e, e.get("frechet_inf")) for e in tokens),
        "fd_image": mean(e.get("relative") for e in pair("image")),
        "knn_unmixing": mean(_one_minus(e.get("knn_mixing")) for e in tokens),
        "probe": mean((e.get("probe") or {}).get("balanced_accuracy") for e in tokens),
        "mmd2": mean(e.get("mmd2") for e in tokens),
        "outlier_auroc": mean(e.get("auroc_token") for e in directed("outliers")),
        "knn_iou_loss": mean(_one_minus(e.get("knn_iou")) for e in directed("segmentation")),
    }


def pair_rows(pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pair entries with the seeds of a training set averaged; Fréchet distances in units of the mean trace of the covariances."""
    rows = []
    for several in grouped(pairs, "train_set", "a", "b", "level", "class"):
        first, probes = several[0], [e.get("probe") or {} for e in several]
        found, null = (
            mean(relative(e, e.get(name)) for e in several) for name in ("frechet", "null")
        )
        ends = [e.get("ci95") or (None, None) for e in several]
        different = [e["reads_as"] == "different" for e in several]
        agreed = (
            first["reads_as"]
            if len(set(different)) == 1
            else f"different in {sum(different)} of {len(several)}"
        )
        rows.append(
            {
                **{
                    name: first.get(name)
                    for name in ("train_set", "a", "b", "level", "class", "n", "slices")
                },
                "models": len(several),
                "reads_as": agreed,
                "different": sum(different) / len(several),
                "frechet": found,
                "null": null,
                "ratio": found / null if found is not None and null else None,
                "low": mean(relative(e, end[0]) for e, end in zip(several, ends, strict=True)),
                "high": mean(relative(e, end[1]) for e, end in zip(several, ends, strict=True)),
                "frechet_inf": mean(relative(e, e.get("frechet_inf")) for e in several),
                "probe": mean(p.get("balanced_accuracy") for p in probes),
                "probe_p": max(
                    (p["p_value"] for p in probes if p.get("p_value") is not None), default=None
                ),
                "mixing": mean(e.get("knn_mixing") for e in several),
            }
        )
    return rows


def crossing_rows(card: Card) -> list[dict[str, Any]]:
    """What labelled tokens of one dataset say about another, and how far outside it lies; seeds averaged.

    Of a dataset without labels the latter alone.
    """
    say, far = (
        {
            (e[0]["train_set"], e[0]["train"], e[0]["test"]): e
            for e in grouped(card[section], "train_set", "train", "test")
        }
        for section in ("segmentation", "outliers")
    )
    alike = {
        (e[0]["train_set"], e[0]["dataset"], e[0]["dataset"]): e
        for e in grouped(card.get("cka", []), "train_set", "dataset")
    }
    rows = []
    for key in dict.fromkeys([*say, *far]):
        several = say.get(key, [])
        probes = [e.get("probe") or {} for e in several]
        rows.append(
            {
                **dict(zip(("train_set", "train", "test"), key, strict=True)),
                "n": several[0].get("n") if several else None,
                "models": len(several or far[key]),
                "knn_iou": mean(e.get("knn_iou") for e in several),
                "probe": mean(p.get("balanced_accuracy") for p in probes),
                "probe_p": max(
                    (p["p_value"] for p in probes if p.get("p_value") is not None), default=None
                ),
                **{
                    name: mean(e.get(name) for e in far.get(key, []))
                    for name in ("auroc_token", "auroc_slice")
                },
                "cka": mean(e.get("cka") for e in alike.get(key, [])),
            }
        )
    return rows


def relative(entry: Mapping[str, Any], value: float | None) -> float | None:
    """A Fréchet distance of a pair entry (its null, its end of an interval) in units of the mean trace of the covariances."""
    if value is None or not entry.get("frechet") or entry.get("relative") is None:
        return None
    return float(value * entry["relative"] / entry["frechet"])


def mean(values: Any) -> float | None:
    """Mean of those that are not None; None of none."""
    there = [value for value in values if value is not None]
    return round(float(np.mean(there)), 6) if there else None


def grouped(entries: Iterable[Mapping[str, Any]], *names: str) -> list[list[Mapping[str, Any]]]:
    """Entries with the same values of these names together, in the order in which they came."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry.get(name) for name in names), []).append(entry)
    return list(groups.values())


def rank_correlation(x: Sequence[float | None], y: Sequence[float]) -> dict[str, Any]:
    """Spearman's rho of the pairs whose x is not None, with a two-sided p from permutations (all of them up to n = 8).

    Returns:
        `rho`, `p_value` (both None with fewer than four points or a constant side), `n`, and then the `reason`.
    """
    both = np.array([(u, v) for u, v in zip(x, y, strict=True) if u is not None], float).reshape(
        -1, 2
    )
    nothing = {"rho": None, "p_value": None, "n": len(both)}
    if len(both) < FEWEST:
        return nothing | {"reason": f"{len(both)} of at least {FEWEST} points"}
    if (both == both[0]).all(0).any():
        return nothing | {"reason": "all values are the same"}
    from scipy.stats import permutation_test, rankdata

    rank = rankdata(both, axis=0)
    rank = (rank - rank.mean(0)) / rank.std(0)
    fixed = rank[:, 1]

    def rho(moved: Any, axis: int = -1) -> Any:
        return np.moveaxis(moved, axis, -1) @ fixed / len(fixed)

    test = permutation_test(
        (rank[:, 0],),
        rho,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    return {
        "rho": round(float(test.statistic), 6),
        "p_value": round(float(test.pvalue), 6),
        "n": len(both),
        "reason": None,
    }


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1 - value
