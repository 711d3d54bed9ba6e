"""Keep the scores of a finished run: `python studies/headline/keep.py`, after `emadapt report`.

Writes results/all_slices.json: the units of reports/summary.json, and of each model the pixels in
both, predicted and labelled of each test slice. What was kept of other regimes stays.
"""

import json
from pathlib import Path

import numpy as np

from emadapt.files import write_text

KEPT = Path(__file__).parent / "results/all_slices.json"

kept = json.loads(KEPT.read_text())
summary = json.loads(Path("reports/summary.json").read_text())
for unit in summary["units"]:
    regime = unit["regime"]
    others = [u for u in kept["units"] if u["regime"] != regime]
    kept["units"] = [*others, unit | {"git": summary["git"]}]
    kept["counts"][regime] = {}
    for file in sorted(Path("build/evaluate").glob(f"*-{regime}-lucchi-*/metrics.json")):
        scores = json.loads(file.read_text())["test"]["lucchi"]
        by_slice = np.array(scores["counts"]).sum(axis=(1, 2))
        kept["counts"][regime][file.parent.name[-1]] = by_slice.tolist()
write_text(KEPT, json.dumps(kept) + "\n")
