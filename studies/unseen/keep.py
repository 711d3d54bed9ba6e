"""Keep the scores of all trained units in results/scores.json: `python studies/unseen/keep.py`.

Of a dataset whose labels a unit never saw, the score is of slices all over it.
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def score(test: dict[str, Any]) -> dict[str, Any]:
    """IoU and interval of the test slices, and of the whole dataset if it is unseen."""
    found = {name: test[name] for name in ("n", "iou", "iou_ci95")}
    if whole := test.get("unseen"):
        found["whole"] = {name: whole[name] for name in ("n", "iou", "iou_ci95")}
    return found


def main(roots: list[Path]) -> None:
    """Read build/evaluate of checkouts."""
    files = [file for root in roots for file in sorted(root.glob("build/evaluate/*/metrics.json"))]
    scores = {}
    for file in files:
        metrics = json.loads(file.read_text())
        scores[metrics["unit"]] = {name: score(test) for name, test in metrics["test"].items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{len(scores)} units")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:] or ["."]])
