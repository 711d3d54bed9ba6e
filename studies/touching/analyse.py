"""Draw results/answer.png and print the README's table of Lucchi from what was kept.

python studies/touching/analyse.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"
WAYS = {"mask": "components of the mask", "boundaries": "`boundaries: true`"}
MEASURES = {
    "ap50": "AP 0.5",
    "ap75": "AP 0.75",
    "pq": "PQ",
    "predicted": "objects",
    "matched": "matched",
    "split": "split",
    "merged": "merged",
    "vi_split": "vi, split",
    "vi_merge": "vi, merged",
}
COUNTS = "predicted", "matched", "split", "merged"

print("| | IoU | " + " | ".join(MEASURES.values()) + " |")
print("|---" + "|---:" * (len(MEASURES) + 1) + "|")
figure, axes = plt.subplots(figsize=(6.5, 2.6))
for row, (name, way) in enumerate(WAYS.items()):
    units = json.loads((RESULTS / f"{name}.json").read_text())
    tests = [unit["lucchi"] for unit in units.values()]
    cells = [f"{np.mean([test['iou'] for test in tests]):.3f}"]
    for measure in MEASURES:
        values = [test["instances"][measure] for test in tests]
        cells.append(f"{np.mean(values):.{1 if measure in COUNTS else 2}f}")
    print(f"| {way} | {' | '.join(cells)} |")
    for column, measure in enumerate(("ap50", "ap75", "pq")):
        values = [test["instances"][measure] for test in tests]
        axes.plot(
            values,
            [column + 0.12 - 0.24 * row] * len(values),
            "os"[row],
            color=("#e69f00", "#0072b2")[row],
            label=None if column else way.replace("`", ""),
        )
axes.set_yticks(range(3), ["AP at IoU 0.5", "AP at IoU 0.75", "panoptic quality"])
axes.invert_yaxis()
axes.set_xlim(0, None)
axes.set_xlabel("objects of Lucchi's test half (points: seeds)")
axes.grid(axis="x", alpha=0.3)
axes.legend(frameon=False)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)
