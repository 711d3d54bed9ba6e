"""Beside the headline, where evaluate has it: how well objects are found, and the IoU at the threshold that validation chose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

VALUES = ("ap50", "ap75", "pq", "sq", "rq")

Combine = Callable[[Sequence[float], Sequence[Sequence[float]]], dict[str, Any]]
"""`emadapt.report.report.combine`: each seed's value and interval -> mean, std, values, ci95."""


def of_seeds(tests: Sequence[Mapping[str, Any]], combine: Combine) -> dict[str, Any]:
    """What an entry of the summary gets: `instances` and `tuned`, each where all seeds have it.

    Args:
        tests: a unit's scores on one test dataset, of each seed.
        combine: means and intervals over seeds.
    """
    found: dict[str, Any] = {}
    if all("instances" in test for test in tests):
        values = {
            name: [test["instances"][name] for test in tests]
            for name in (*VALUES, "predicted", "labelled", "matched")
        }
        found["instances"] = {
            name: {"mean": round(float(np.mean(own)), 6), "values": own}
            for name, own in values.items()
        }
    if all("tuned" in test for test in tests):
        iou = combine(
            [test["tuned"]["iou"] for test in tests], [test["tuned"]["iou_ci95"] for test in tests]
        )
        found["tuned"] = {"thresholds": [test["tuned"]["threshold"] for test in tests], "iou": iou}
    return found


def beside_headline(scores: Mapping[str, Any]) -> dict[str, float]:
    """Of a unit's scores on a test dataset what the lab book gets, too: `ap50`, `pq`, `iou_tuned`, where they are there."""
    own, tuned = scores.get("instances"), scores.get("tuned")
    return ({name: own[name] for name in ("ap50", "pq")} if own else {}) | (
        {"iou_tuned": tuned["iou"]} if tuned else {}
    )


def objects_boards(boards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's leaderboards with the rows that have either; those without any are left out."""
    kept = [
        {**board, "rows": [row for row in board["rows"] if "instances" in row or "tuned" in row]}
        for board in boards
    ]
    return [board for board in kept if board["rows"]]


def thresholds_words(tuned: Mapping[str, Any]) -> str:
    """The thresholds of the seeds, equal ones once: "0.41, 0.42"."""
    return ", ".join(dict.fromkeys(f"{threshold:.2f}" for threshold in tuned["thresholds"]))


def objects_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a row for each model and test dataset; none where no entry has either."""
    rows = [entry for entry in entries if "instances" in entry or "tuned" in entry]
    if not rows:
        return []
    lines = [
        "",
        "## Objects, and another threshold",
        "",
        "Objects are connected components over the test slices (voxels that share a face), at threshold 0.5. AP: TP / (TP + FP +"
        " FN) at IoU above 0.5 and 0.75; PQ = SQ x RQ: panoptic quality; means over seeds. Tuned: the threshold that validation"
        " slices chose, and the IoU there with its 95 % interval; the headline stays at 0.5.",
        "",
        "| tested on | backbone | regime | trained on | AP 0.5 | AP 0.75 | PQ | SQ | RQ | objects found / labelled |"
        " threshold | IoU there | IoU at 0.5 |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in sorted(rows, key=lambda e: (e["test_set"], -e["iou"]["mean"])):
        own, tuned = entry.get("instances"), entry.get("tuned")
        cells = [
            f"`{entry['test_set']}`",
            *(entry[name] for name in ("backbone", "regime", "train_set")),
        ]
        cells += [f"{own[name]['mean']:.3f}" for name in VALUES] if own else ["-"] * len(VALUES)
        cells.append(
            f"{own['predicted']['mean']:.4g} / {own['labelled']['mean']:.4g}" if own else "-"
        )
        if tuned:
            low, high = tuned["iou"]["ci95"]
            cells += [
                thresholds_words(tuned),
                f"{tuned['iou']['mean']:.3f} ({low:.3f} to {high:.3f})",
            ]
        else:
            cells += ["-", "-"]
        lines.append(f"| {' | '.join([*cells, format(entry['iou']['mean'], '.3f')])} |")
    return lines
