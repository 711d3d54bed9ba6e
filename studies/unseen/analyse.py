"""Draw results/answer.png and print the README's table from results/summary.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SUMMARY = json.loads((RESULTS / "summary.json").read_text())
UNITS = {(u["backbone"], u["regime"], u["train_set"], u["test_set"]): u for u in SUMMARY["units"]}
GAINS = {(a["align"], a["train_set"], a["test_set"]): a for a in SUMMARY["aligned"]}
DIRECTIONS = {"Lucchi to VNC": ("to_vnc", "vnc"), "VNC to Lucchi": ("to_lucchi", "lucchi")}
WAYS = {  # the unit's backbone and regime, and what the report calls their gain
    "histograms matched and adversarial loss": (
        "histogram",
        "adversarial",
        "histogram + adversarial",
    ),
    "histograms matched": ("histogram", "frozen", "histogram"),
    "adversarial loss": ("dinov2_s", "adversarial", "adversarial"),
    "histograms matched and CORAL": ("histogram", "coral", "histogram + coral"),
    "CORAL": ("dinov2_s", "coral", "coral"),
}


def draw() -> None:
    """Plot the gain of each way, in both directions."""
    figure, axes = plt.subplots(figsize=(9, 3.4))
    for n, (direction, key) in enumerate(DIRECTIONS.items()):
        colour, marker = ("#0072b2", "o") if n == 0 else ("#d55e00", "s")
        for k, (_, _, align) in enumerate(WAYS.values()):
            gain, at = GAINS[align, *key], -k + 0.12 - 0.24 * n
            label = None if k else direction
            axes.plot(gain["ci95"], [at, at], color=colour, lw=2)
            axes.plot(gain["difference"], at, marker, color=colour, ms=7, label=label)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks([-k for k in range(len(WAYS))], list(WAYS))
    axes.set_xlabel("change of foreground IoU on the dataset without labels, 95 %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "answer.png", dpi=110)


def row(name: str, backbone: str, regime: str, align: str) -> str:
    """A row of the table: IoU and gain in both directions."""
    cells = [name]
    for key in DIRECTIONS.values():
        cells.append(f"{UNITS[backbone, regime, *key]['unseen']['iou']['mean']:.3f}")
        gain = GAINS.get((align, *key))
        text = (
            "{:+.3f} ({:+.3f} to {:+.3f})".format(gain["difference"], *gain["ci95"]) if gain else ""
        )
        cells.append(text)
    return "| " + " | ".join(cells) + " |"


draw()
print("| | " + " | gain | ".join(DIRECTIONS) + " | gain |\n|---|---|---|---|---|")
for name, way in {"nothing": ("dinov2_s", "frozen", ""), **WAYS}.items():
    print(row(name, *way))
