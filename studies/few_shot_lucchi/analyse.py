"""Draw results/answer.png and print the README's table from results/summary.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
UNITS = {
    (unit["regime"], unit["train_set"]): unit["iou"]
    for unit in json.loads((RESULTS / "summary.json").read_text())["units"]
    if unit["test_set"] == "lucchi"
}
SLICES = {1: "lucchi_1", 4: "lucchi_4", 16: "lucchi_16", 48: "lucchi"}
REGIMES = {
    "lora": ("LoRA, last three blocks", "#009e73", "^"),
    "frozen": ("frozen", "#0072b2", "o"),
    "ridge": ("ridge regression on tokens", "#e69f00", "s"),
}

figure, axes = plt.subplots(figsize=(7, 3.6))
for k, (regime, (label, colour, marker)) in enumerate(REGIMES.items()):
    shift = 1.04 ** (k - 1)
    means = [UNITS[regime, train]["mean"] for train in SLICES.values()]
    axes.plot([n * shift for n in SLICES], means, marker=marker, color=colour, label=label)
    for n, train in SLICES.items():
        values = UNITS[regime, train]["values"]
        axes.plot([n * shift] * len(values), values, "_", color=colour, ms=9)
axes.set_xscale("log")
axes.set_xticks(list(SLICES), [str(n) for n in SLICES])
axes.minorticks_off()
axes.set_xlabel("labelled slices")
axes.set_ylabel("foreground IoU (dashes: seeds)")
axes.grid(alpha=0.3)
axes.legend(frameon=False, loc="lower right", fontsize=9)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)

print("| labelled slices | " + " | ".join(map(str, SLICES)) + " |\n|---|---|---|---|---|")
for regime, (label, *_) in REGIMES.items():
    ious = [UNITS[regime, train] for train in SLICES.values()]
    cells = [f"{iou['mean']:.3f} ± {iou['std']:.3f}" for iou in ious]
    print(f"| {label} | " + " | ".join(cells) + " |")
