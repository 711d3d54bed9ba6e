"""How many labels are enough? IoU of models of one dataset against the number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emadapt.report.units import Entry

ENOUGH = 0.9
"""Share of the IoU with all labels that counts as enough."""


def curves(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A curve for each test dataset, unit of amount, backbone and regime.

    Models trained on the test dataset alone are its points. Those whose warm start saw more of
    its labels are left out.

    Args:
        entries: `units` of summary.json.

    Returns:
        `test_set`, `amount` ("slices" or "tiles"), `backbone`, `regime`; `points` by rising `n`,
        with `all`, `iou`, `ci95`; `enough`: the smallest measured `n` with ENOUGH of the IoU of
        all labels, None if none or not known. [] if no model has few labels.
    """
    found = []
    own = [e for e in entries if e["relation"] == "in-domain" and not e["seen_before"]]
    few = [e for e in own if e["amount"] != "all"]
    lines = dict.fromkeys((e["test_set"], e["amount"], e["backbone"], e["regime"]) for e in few)
    for test_set, amount, backbone, regime in lines:
        points = [
            _point(entry, amount)
            for entry in own
            if (entry["test_set"], entry["backbone"], entry["regime"])
            == (test_set, backbone, regime)
            and entry["amount"] in (amount, "all")
        ]
        points.sort(key=lambda point: (point["n"], point["all"]))
        curve = {"test_set": test_set, "amount": amount, "backbone": backbone, "regime": regime}
        found.append({**curve, "points": points, "enough": enough(points)})
    return found


def enough(points: Sequence[dict[str, Any]]) -> int | None:
    """The smallest measured number of labels that gives ENOUGH of the IoU of all labels."""
    complete = [point["iou"] for point in points if point["all"]]
    if not complete:
        return None
    wanted = round(ENOUGH * complete[0], 6)
    return next((p["n"] for p in points if not p["all"] and p["iou"] >= wanted), None)


def _point(entry: Entry, amount: str) -> dict[str, Any]:
    n, of = entry["labelled"]["crops" if amount == "tiles" else "slices"]
    complete = entry["amount"] == "all"
    iou = {"iou": entry["iou"]["mean"], "ci95": entry["iou"]["ci95"]}
    return {"n": of if complete else n, "all": complete, **iou}
