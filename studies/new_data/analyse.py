"""Draw results/answer.png and print the README's table from results/summary.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
UNITS = {
    (unit["backbone"], unit["train_set"], unit["test_set"]): unit["iou"]
    for unit in json.loads((RESULTS / "summary.json").read_text())["units"]
}
LABELS = {  # training sets where Lucchi is the new dataset, and where VNC is
    "all of the other dataset": ("vnc", "lucchi"),
    "one slice of the new one": ("lucchi_1", "vnc_1"),
    "both of these": ("vnc_and_lucchi_1", "lucchi_and_vnc_1"),
    "all of the new dataset": ("lucchi", "vnc"),
}
BACKBONES = {"dinov2_s": ("as it is", "#0072b2"), "histogram": ("histograms matched", "#e69f00")}


def draw() -> None:
    """Plot mean IoU as bars and seeds as ticks."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3), sharey=True, sharex=True)
    for column, (axes, new) in enumerate(zip(panels, ("lucchi", "vnc"), strict=True)):
        for n, (backbone, (label, colour)) in enumerate(BACKBONES.items()):
            ious = [UNITS[backbone, sets[column], new] for sets in LABELS.values()]
            at = [-k + 0.18 - 0.36 * n for k in range(len(ious))]
            axes.barh(at, [iou["mean"] for iou in ious], 0.34, color=colour, label=label)
            for y, iou in zip(at, ious, strict=True):
                axes.plot(iou["values"], [y] * len(iou["values"]), "k|", ms=9)
        axes.set_yticks([-k for k in range(len(LABELS))], list(LABELS))
        axes.set_xlim(0, 1)
        axes.set_title("Lucchi is new" if new == "lucchi" else "VNC is new")
        axes.set_xlabel("foreground IoU (ticks: seeds)")
    panels[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(RESULTS / "answer.png", dpi=110)


draw()
print("| labels seen | Lucchi is new | histograms matched | VNC is new | histograms matched |")
print("|---|---|---|---|---|")
for name, (lucchi, vnc) in LABELS.items():
    pairs = [
        (b, train, new) for train, new in ((lucchi, "lucchi"), (vnc, "vnc")) for b in BACKBONES
    ]
    cells = [f"{UNITS[pair]['mean']:.3f} ± {UNITS[pair]['std']:.3f}" for pair in pairs]
    print(f"| {name} | " + " | ".join(cells) + " |")
