"""Draw results/answer.png and print the README's table of the studies align and unseen."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDIES = Path(__file__).parents[1]
COLOURS = {"Lucchi to VNC": ("#0072b2", "o"), "VNC to Lucchi": ("#d55e00", "s")}
TRAINED = {  # of each study: the training sets of the two directions, and the ways in their order
    "align": (("lucchi", "vnc"), ["histogram", "clahe", "standardise", "fda", "voxel"]),
    "unseen": (
        ("to_vnc", "to_lucchi"),
        ["histogram + adversarial", "histogram", "adversarial", "histogram + coral", "coral"],
    ),
}


def draw(path: Path, ways: list[str], gains: dict[tuple[str, str], Any]) -> None:
    """Plot the gain of each way, in both directions."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for n, (direction, (colour, marker)) in enumerate(COLOURS.items()):
        for k, way in enumerate(ways):
            gain, at = gains[way, direction], -k + 0.12 - 0.24 * n
            label = None if k else direction
            axes.plot(gain["ci95"], [at, at], color=colour, lw=2)
            axes.plot(gain["difference"], at, marker, color=colour, ms=7, label=label)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks([-k for k in range(len(ways))], ways)
    axes.set_xlabel("change of foreground IoU on the dataset without labels, 95 %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def show(study: str) -> None:
    """Draw the figure of a study and print its table."""
    results = STUDIES / study / "results"
    summary = json.loads((results / "summary.json").read_text())
    train_sets, ways = TRAINED[study]
    tests = dict(zip(COLOURS, zip(train_sets, ("vnc", "lucchi"), strict=True), strict=True))
    ious = {
        (u["backbone"], u["regime"], u["train_set"]): u["unseen"]["iou"]["mean"]
        for u in summary["units"]
        if u.get("unseen")
    }
    gains = {
        (gain["align"], direction): gain
        for direction, key in tests.items()
        for gain in summary["aligned"]
        if (gain["train_set"], gain["test_set"]) == key
    }
    draw(results / "answer.png", ways, gains)
    print("| IoU, and gain with its 95 % interval | Lucchi to VNC | gain | VNC to Lucchi | gain |")
    print("|---|---|---|---|---|")
    alone = [f"{ious['dinov2_s', 'frozen', train]:.3f} | " for train, _ in tests.values()]
    print("| nothing | " + "| ".join(alone) + "|")
    for way in ways:
        row = f"| {way} |"
        for direction, (train, _) in tests.items():
            gain = gains[way, direction]
            low, high = gain["ci95"]
            row += f" {ious[gain['backbone'], gain['regime'], train]:.3f} |"
            row += f" {gain['difference']:+.3f} ({low:+.3f} to {high:+.3f}) |"
        print(row)


for name in TRAINED:
    show(name)
