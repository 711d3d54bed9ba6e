"""Keep the scores of all trained units in results/ of a study.

`python studies/keep_scores.py unseen` reads build/evaluate here, and of further checkouts that are
named. Of a dataset whose labels a unit never saw, the score is of slices all over it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

KEPT = "n", "iou", "iou_ci95", "instances"


def score(test: dict[str, Any]) -> dict[str, Any]:
    """IoU and interval of the test slices and, if the dataset is unseen, of the whole; objects."""
    found = {name: test[name] for name in KEPT if name in test}
    if whole := test.get("unseen"):
        found["whole"] = {name: whole[name] for name in KEPT[:3]}
    return found


def main() -> None:
    """Write results/NAME.json of a study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()])
    parser.add_argument("--name", default="scores")
    asked = parser.parse_intermixed_args()
    scores = {}
    for root in asked.checkouts:
        for file in sorted(root.glob("build/evaluate/*/metrics.json")):
            metrics = json.loads(file.read_text())
            scores[metrics["unit"]] = {name: score(test) for name, test in metrics["test"].items()}
    results = Path(__file__).parent / asked.study / "results"
    results.mkdir(exist_ok=True)
    (results / f"{asked.name}.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{len(scores)} units")


if __name__ == "__main__":
    main()
