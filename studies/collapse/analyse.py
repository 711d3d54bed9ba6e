"""Draw results/answer.png and print the README's table from results/summary.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
UNITS = {
    (unit["regime"], unit["train_set"], unit["test_set"]): unit["iou"]
    for unit in json.loads((RESULTS / "summary.json").read_text())["units"]
}
REGIMES = {
    "frozen": ("frozen", "#0072b2", "o"),
    "frozen_bn": ("frozen, BatchNorm", "#56b4e9", "D"),
    "last3": ("LoRA", "#009e73", "^"),
    "unet2d": ("U-Net from scratch", "#d55e00", "s"),
}
# What was trained on: the training set where Lucchi is tested, and where VNC is.
TRAINING = {
    "one dataset": ("lucchi", "vnc"),
    "both, equal shares": ("paired", "paired"),
    "both, by size": ("paired_by_size", "paired_by_size"),
    "both, Lucchi mispaired": ("paired_far", "paired_far"),
    "Lucchi alone, mispaired": ("lucchi_far", None),
}


def draw() -> None:
    """Plot mean IoU with its lowest and highest seed: a panel for each test dataset."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for column, (axes, test) in enumerate(zip(panels, ("lucchi", "vnc"), strict=True)):
        names = [name for name, sets in TRAINING.items() if sets[column]]
        for k, (regime, (label, colour, marker)) in enumerate(REGIMES.items()):
            ious = [UNITS[regime, TRAINING[name][column], test] for name in names]
            at = [x + 0.13 * (k - 1.5) for x in range(len(names))]
            means = [iou["mean"] for iou in ious]
            below = [iou["mean"] - min(iou["values"]) for iou in ious]
            above = [max(iou["values"]) - iou["mean"] for iou in ious]
            axes.errorbar(at, means, [below, above], fmt=marker, color=colour, label=label)
        axes.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=8)
        axes.set_title("tested on Lucchi" if test == "lucchi" else "tested on VNC")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("foreground IoU (bars: seeds)")
    panels[0].set_ylim(0.2, 0.95)
    panels[1].legend(frameon=False, fontsize=9, loc="lower left")
    figure.tight_layout()
    figure.savefig(RESULTS / "answer.png", dpi=110)


def table() -> str:
    """Mean IoU, Lucchi / VNC."""
    lines = [
        "| trained on (IoU on Lucchi / VNC) | "
        + " | ".join(label for label, *_ in REGIMES.values())
        + " |"
    ]
    lines.append("|---" * (1 + len(REGIMES)) + "|")
    for name, sets in TRAINING.items():
        cells = [
            " / ".join(
                f"{UNITS[regime, train, test]['mean']:.3f}" if train else "-"
                for train, test in zip(sets, ("lucchi", "vnc"), strict=True)
            )
            for regime in REGIMES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


draw()
print(table())
