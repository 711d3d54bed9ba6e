"""Draw results/answer.png and print the README's table from results/summary.json."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from emadapt.metrics.intervals import added, of_seeds

RESULTS = Path(__file__).parent / "results"
UNITS = {
    (unit["regime"], unit["train_set"], unit["test_set"]): unit
    for unit in json.loads((RESULTS / "summary.json").read_text())["units"]
}
REGIMES = {
    "lora": "LoRA, rank 16, alpha 32",
    "lora_random": "the same, from a random head",
    "lora_short": "the same, 1 epoch",
    "lora_alpha8": "rank 16, alpha 8",
    "lora_rank4": "rank 4, alpha 8",
    "last3": "last three blocks",
    "wise50": "half way to frozen",
}


def ious(regime: str, train: str, test: str) -> Any:
    """IoU over seeds: test slices at home, all slices of the unseen dataset away."""
    unit = UNITS[regime, train, test]
    return unit["iou"] if train == test else unit["unseen"]["iou"]


def gained(regime: str, train: str, test: str) -> tuple[float, float]:
    """Change of the mean IoU against frozen, and half of its 95 % interval over seeds (Welch)."""
    own, frozen = (np.array(ious(r, train, test)["values"]) for r in (regime, "frozen"))
    return float(own.mean() - frozen.mean()), added(of_seeds(own), of_seeds(frozen)).margin(0.975)


def draw() -> None:
    """Plot the change against frozen, at home and away."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, sharex=True)
    for axes, train, away in zip(panels, ("lucchi", "vnc"), ("vnc", "lucchi"), strict=True):
        for n, (test, label) in enumerate(((train, "at home"), (away, "on the unseen dataset"))):
            colour, marker = ("#0072b2", "o") if n == 0 else ("#d55e00", "s")
            for k, regime in enumerate(REGIMES):
                (gain, margin), at = gained(regime, train, test), -k + 0.15 - 0.3 * n
                axes.plot([gain - margin, gain + margin], [at, at], color=colour, lw=2)
                axes.plot(gain, at, marker, color=colour, label=None if k else label)
        axes.axvline(0, color="black", lw=1)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title("trained on Lucchi" if train == "lucchi" else "trained on VNC")
        axes.set_xlabel("change of IoU against frozen, 95 % over seeds")
    panels[0].set_yticks([-k for k in range(len(REGIMES))], list(REGIMES.values()))
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, ncols=2, loc="lower center"
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(RESULTS / "answer.png", dpi=110)


draw()
pairs = [("lucchi", "lucchi"), ("lucchi", "vnc"), ("vnc", "vnc"), ("vnc", "lucchi")]
print("| IoU | Lucchi to Lucchi | Lucchi to VNC | VNC to VNC | VNC to Lucchi |")
print("|---|---|---|---|---|")
for regime, name in {"frozen": "frozen", **REGIMES}.items():
    print(
        f"| {name} | " + " | ".join(f"{ious(regime, *pair)['mean']:.3f}" for pair in pairs) + " |"
    )
