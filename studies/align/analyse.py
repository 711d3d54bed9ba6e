"""Draw the figure and print the table of study align, and of the first run of study unseen."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from emadapt.metrics.intervals import added, of_seeds

STUDIES = Path(__file__).parents[1]
COLOURS = {"Lucchi to VNC": ("#0072b2", "o"), "VNC to Lucchi": ("#d55e00", "s")}
TRAINED = {  # of each study: the training sets of the two directions, and the ways in their order
    "align": (("lucchi", "vnc"), ["histogram", "clahe", "standardise", "fda", "voxel"]),
    "unseen": (
        ("to_vnc", "to_lucchi"),
        ["histogram + adversarial", "histogram", "adversarial", "histogram + coral", "coral"],
    ),
}
LOSSES = ("adversarial", "coral")  # regimes; the other ways are backbones


def draw(path: Path, ways: list[str], gains: dict[tuple[str, str], Any]) -> None:
    """Plot the gain of each way, in both directions."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for n, (direction, (colour, marker)) in enumerate(COLOURS.items()):
        for k, way in enumerate(ways):
            gain, at = gains[way, direction], -k + 0.12 - 0.24 * n
            label = None if k else direction
            mean, margin = gain
            axes.plot([mean - margin, mean + margin], [at, at], color=colour, lw=2)
            axes.plot(mean, at, marker, color=colour, ms=7, label=label)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks([-k for k in range(len(ways))], ways)
    axes.set_xlabel("change of foreground IoU on the dataset without labels, 95 % over seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def show(study: str) -> None:
    """Draw the figure of a study and print its table."""
    results = STUDIES / study / "results"
    train_sets, ways = TRAINED[study]
    tests = dict(zip(COLOURS, zip(train_sets, ("vnc", "lucchi"), strict=True), strict=True))
    ious = {
        (u["backbone"], u["regime"], u["train_set"]): np.array(u["unseen"]["iou"]["values"])
        for u in json.loads((results / "summary.json").read_text())["units"]
        if u.get("unseen")
    }

    def with_way(way: str, train: str) -> Any:
        """IoU of each seed; nothing: the plain frozen backbone."""
        parts = way.split(" + ") if way else []
        backbone = next((part for part in parts if part not in LOSSES), "dinov2_s")
        regime = next((part for part in parts if part in LOSSES), "frozen")
        return ious[backbone, regime, train]

    gains = {}
    for way in ways:
        for direction, (train, _) in tests.items():
            own, plain = with_way(way, train), with_way("", train)
            margin = added(of_seeds(own), of_seeds(plain)).margin(0.975)
            gains[way, direction] = float(own.mean() - plain.mean()), margin
    draw(results / ("answer.png" if study == "align" else "gains.png"), ways, gains)
    print("| IoU, and gain (95 % over seeds) | Lucchi to VNC | gain | VNC to Lucchi | gain |")
    print("|---|---|---|---|---|")
    alone = [f"{with_way('', train).mean():.3f} | " for train, _ in tests.values()]
    print("| nothing | " + "| ".join(alone) + "|")
    for way in ways:
        row = f"| {way} |"
        for direction, (train, _) in tests.items():
            gain, margin = gains[way, direction]
            row += f" {with_way(way, train).mean():.3f} |"
            row += f" {gain:+.3f} ({gain - margin:+.3f} to {gain + margin:+.3f}) |"
        print(row)


for name in TRAINED:
    show(name)
