"""How many labels are enough? IoU against the number of labelled slices (or tiles), from the entries of a summary."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emadapt.report.comparisons import Entry, seen_elsewhere
from emadapt.study.study import Study, Unit

ENOUGH = 0.9
"""Share of the IoU with all labels that counts as enough."""
FEW_SHOT_METHOD = (
    f"`enough.n`: the smallest measured number of labels with at least {100 * ENOUGH:.0f} % of the IoU that all labels give;"
    " nothing is interpolated; null: not reached before all. `earliest` and `latest` read the same off the upper and the lower"
    " ends of the points' 95 % intervals, the IoU of all labels as it is: test slices are the same for every point, so they lie"
    " too far apart rather than too close. Each seed draws its own slices. Validation slices, which choose the epoch, are not"
    " counted."
)


def few_shot_curves(study: Study, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One curve per backbone, regime, datasets of the training set, kind of amount (slices or crops) and test dataset among them.

    Units whose source has seen other labels of the test dataset are left out: their number of labels would be a lie.

    Args:
        study: its training sets; one with `slices` or `crops` is a point, one without is the last point of its datasets.
        entries: "units" of the summary.

    Returns:
        [] where no training set has few labels. `points` by number of labels; `enough` as FEW_SHOT_METHOD says, None where
        there is no unit with all labels.
    """
    iou = {(e["backbone"], e["regime"], e["train_set"], e["test_set"]): e for e in entries}
    found = []
    for datasets, amount in _kinds(study):
        sets = [name for name in study.train_sets if _is_point(study, name, datasets, amount)]
        regimes = [regime for regime in study.regimes if study.regime_settings[regime].trains]
        for backbone, regime in (
            (backbone, regime) for backbone in study.backbones for regime in regimes
        ):
            for test_set in datasets:
                honest = [
                    name for name in sets if test_set not in _seen(study, backbone, regime, name)
                ]
                points = _points(
                    study, [iou[backbone, regime, name, test_set] for name in honest], amount
                )
                if any(not point["all"] for point in points):
                    found.append(
                        {
                            "backbone": backbone,
                            "regime": regime,
                            "datasets": list(datasets),
                            "amount": amount,
                            "test_set": test_set,
                            "points": points,
                            "enough": enough(points),
                        }
                    )
    return found


def enough(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The smallest measured number of labels that gives ENOUGH of the IoU of all labels; None without a point for those.

    Args:
        points: by rising `n`, with `iou`, `ci95`, `all`.

    Returns:
        `share`, `iou` (what has to be reached) and `n`, `earliest`, `latest`, None where nothing but all labels reaches it.
    """
    whole = [point["iou"] for point in points if point["all"]]
    if not whole:
        return None
    wanted = round(ENOUGH * whole[0], 6)  # as the points are

    def first(value: Any) -> int | None:
        return next(
            (point["n"] for point in points if not point["all"] and value(point) >= wanted), None
        )

    return {
        "share": ENOUGH,
        "iou": wanted,
        "n": first(lambda point: point["iou"]),
        "earliest": first(lambda point: point["ci95"][1]),
        "latest": first(lambda point: point["ci95"][0]),
    }


def panels(curves: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Curves that share axes: the same test dataset, datasets and kind of amount.

    Returns:
        For each `test_set`, `datasets`, `amount` ("slices" or "tiles"), `n` (every number of labels measured, ascending, with
        whether it is all of them) and `curves`.
    """
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for curve in curves:
        found.setdefault((curve["test_set"], tuple(curve["datasets"]), curve["amount"]), []).append(
            curve
        )
    return [
        {
            "test_set": test_set,
            "datasets": list(datasets),
            "amount": "tiles" if amount == "crops" else amount,
            "n": sorted({(point["n"], point["all"]) for curve in own for point in curve["points"]}),
            "curves": own,
        }
        for (test_set, datasets, amount), own in found.items()
    ]


def enough_words(curve: Mapping[str, Any]) -> str:
    """E.g. "4 (1 to > 16)" or "> 16": how many labels are enough, and the reading of the intervals."""
    found = curve["enough"]
    if found is None:
        return "unknown: no unit with all labels"
    most = max(point["n"] for point in curve["points"] if not point["all"])
    n, earliest, latest = (
        f"> {most}" if found[key] is None else str(found[key])
        for key in ("n", "earliest", "latest")
    )
    return n if earliest == n == latest else f"{n} ({earliest} to {latest})"


def few_shot_table(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a table per panel, a row per backbone and regime, a column per number of labels."""
    lines = [
        "",
        "## Few labels",
        "",
        "Foreground IoU with its 95 % interval by the number of labelled training slices (or tiles); validation slices, which"
        " choose the epoch, are not counted. Last column: the smallest",
        f"measured number that gives {100 * ENOUGH:.0f} % of the IoU with all labels, and the same read off the ends of the"
        " intervals.",
    ]
    for panel in panels(curves):
        heads = [f"{n} (all)" if every else str(n) for n, every in panel["n"]] + [
            f"{100 * ENOUGH:.0f} % with"
        ]
        lines += [
            "",
            f"### Tested on `{panel['test_set']}`, labelled {panel['amount']} of {' and '.join(panel['datasets'])}"
            f" ([figure](figures/few-shot-{panel['test_set']}.png))",
            "",
            f"| backbone | regime | {' | '.join(heads)} |",
            "|---|---|" + "---:|" * len(heads),
        ]
        for curve in panel["curves"]:
            at = {(point["n"], point["all"]): point for point in curve["points"]}
            cells = [_cell(at[place]) if place in at else "–" for place in panel["n"]]
            lines.append(
                f"| {curve['backbone']} | {curve['regime']} | {' | '.join(cells)} | {enough_words(curve)} |"
            )
    return lines


def _cell(point: Mapping[str, Any]) -> str:
    return f"{point['iou']:.3f} ({point['ci95'][0]:.3f} to {point['ci95'][1]:.3f})"


def _kinds(study: Study) -> list[tuple[tuple[str, ...], str]]:
    """(datasets, slices or crops) of the training sets with few labels, each once."""
    few = [
        study.train_set_settings[name]
        for name in study.train_sets
        if study.train_set_settings[name].few
    ]
    few = [
        spec for spec in few if not isinstance(spec.slices, dict)
    ]  # of one dataset few, of another all: not on a curve
    return list(
        dict.fromkeys(
            (tuple(sorted(spec.datasets)), "crops" if spec.crops else "slices") for spec in few
        )
    )


def _is_point(study: Study, name: str, datasets: tuple[str, ...], amount: str) -> bool:
    spec = study.train_set_settings[name]
    if isinstance(spec.slices, dict):
        return False
    return tuple(sorted(spec.datasets)) == datasets and (
        not spec.few or bool(getattr(spec, amount))
    )


def _seen(study: Study, backbone: str, regime: str, train_set: str) -> set[str]:
    return seen_elsewhere(study, Unit(backbone, regime, train_set, study.seeds[0]))


def _points(study: Study, entries: Sequence[Entry], amount: str) -> list[dict[str, Any]]:
    """Points by rising number of labels; the number of all labels is what the units with few say there is."""
    total = next((e["labelled"][amount][1] for e in entries if e["labelled"]), None)
    points = []
    for entry in entries:
        every = not study.train_set_settings[entry["train_set"]].few
        if total is None or not (every or entry["labelled"]):
            continue  # metrics that do not say how many labels there were
        n = total if every else entry["labelled"][amount][0]
        points.append(
            {
                "train_set": entry["train_set"],
                "n": n,
                "of": total,
                "all": every,
                "iou": entry["iou"]["mean"],
                "ci95": entry["iou"]["ci95"],
                "seeds": len(entry["iou"]["values"]),
            }
        )
    return sorted(points, key=lambda point: (point["n"], point["all"]))
