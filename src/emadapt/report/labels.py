"""How many labels are enough? IoU of models of one dataset against the number of labels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from emadapt.report.units import Entry, key_of, score_of


def curves(entries: Sequence[Entry], contrasts: Sequence[Entry]) -> list[dict[str, Any]]:
    """A curve for each test dataset, unit of amount, backbone and regime.

    Models trained on the test dataset alone are its points. Those whose warm start saw more of
    its labels are left out. Numbers of labels are tested from the largest down, until one is not
    shown to be enough: so all tests together err as seldom as one (Maurer et al. 1995).

    Args:
        entries: `units` of summary.json.
        contrasts: `contrasts` of it.

    Returns:
        `test_set`, `amount` ("slices", "tiles" or "images"), `backbone`, `regime`; `points` by
        rising `n`, with `all`, `score`, `ci95`; `enough`: the smallest `n` that is, like every
        larger one, shown to be as good as all labels; None if none is. [] without few labels.
    """
    found = []
    shown = [row for row in contrasts if row["factor"] == "labels" and row["as_good"]]
    good = {(row["test_set"], *key_of(row["model"])) for row in shown}
    own = [e for e in entries if e["relation"] == "in-domain" and not e["seen_before"]]
    few = [e for e in own if e["amount"] != "all"]
    lines = dict.fromkeys((e["test_set"], e["amount"], e["backbone"], e["regime"]) for e in few)
    for test_set, amount, backbone, regime in lines:
        model = {"test_set": test_set, "backbone": backbone, "regime": regime}
        at = [e for e in own if model.items() <= e.items() and e["amount"] in (amount, "all")]
        points = sorted((_point(e, amount) for e in at), key=lambda p: (p["n"], p["all"]))
        few_n = sorted({point["n"] for point in points if not point["all"]}, reverse=True)
        good_n = {_point(e, amount)["n"] for e in at if (test_set, *key_of(e)) in good}
        enough = min(itertools.takewhile(good_n.__contains__, few_n), default=None)
        found.append({**model, "amount": amount, "points": points, "enough": enough})
    return found


def _point(entry: Entry, amount: str) -> dict[str, Any]:
    n, of = entry["labelled"]["crops" if amount == "tiles" else "slices"]
    complete = entry["amount"] == "all"
    score = entry[score_of(entry)]
    found = {"score": score["mean"], "ci95": score["ci95"]}
    return {"n": of if complete else n, "all": complete, **found}
