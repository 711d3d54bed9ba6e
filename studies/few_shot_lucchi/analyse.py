"""Draw results/answer.png and print the README's table of few_shot_lucchi and few_shot_vnc."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDIES = Path(__file__).parents[1]
SLICES = {"lucchi": [1, 4, 16, 48], "vnc": [1, 2, 4, 8, 12]}  # the last: all
REGIMES = {
    "lora": ("LoRA, last three blocks", "#009e73", "^"),
    "frozen": ("frozen", "#0072b2", "o"),
    "ridge": ("ridge regression on tokens", "#e69f00", "s"),
}


def show(dataset: str) -> None:
    """Draw IoU by the number of labelled slices, and print it."""
    results = STUDIES / f"few_shot_{dataset}" / "results"
    ious = {
        (unit["regime"], unit["train_set"]): unit["iou"]
        for unit in json.loads((results / "summary.json").read_text())["units"]
        if unit["test_set"] == dataset
    }
    counts = SLICES[dataset]
    names = [f"{dataset}_{n}" for n in counts[:-1]] + [dataset]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    print(f"| labelled slices of {dataset} | " + " | ".join(map(str, counts)) + " |")
    print("|---" * (len(counts) + 1) + "|")
    for k, (regime, (label, colour, marker)) in enumerate(REGIMES.items()):
        if (regime, dataset) not in ious:
            continue
        found = [ious[regime, name] for name in names]
        at = [n * 1.04 ** (k - 1) for n in counts]
        means = [iou["mean"] for iou in found]
        axes.plot(at, means, marker=marker, color=colour, label=label)
        for x, iou in zip(at, found, strict=True):
            axes.plot([x] * len(iou["values"]), iou["values"], "_", color=colour, ms=9)
        cells = [f"{iou['mean']:.3f} ± {iou['std']:.3f}" for iou in found]
        print(f"| {label} | " + " | ".join(cells) + " |")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_xlabel("labelled slices")
    axes.set_ylabel("foreground IoU (dashes: seeds)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(results / "answer.png", dpi=110)


for name in SLICES:
    show(name)
