"""Draw results/answer.png and print the README's table from what keep_scores.py kept."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from emadapt.metrics.intervals import of_seeds

RESULTS = Path(__file__).parent / "results"
STARTS = {  # of a model of the target: regime by target
    "random values": dict.fromkeys(("lucchi", "vnc"), "scratch"),
    "random values, 800 steps": dict.fromkeys(("lucchi", "vnc"), "longer"),
    "the other EM volume": {"lucchi": "from_vnc", "vnc": "from_lucchi"},
    "synthetic FIB-SEM": dict.fromkeys(("lucchi", "vnc"), "from_phantom"),
}
GAINS = {
    "random values": ["synthetic FIB-SEM"],
    "random values, 800 steps": ["the other EM volume", "synthetic FIB-SEM"],
}
TARGETS = {"lucchi": "Lucchi", "vnc": "VNC"}
LABELS = 10, 100

scores = {}
for name in ("scores", "longer"):
    scores |= json.loads((RESULTS / f"{name}.json").read_text())


def ious(start: str, target: str, share: int) -> np.ndarray:
    """Test IoU of each seed of a start."""
    unit = f"em-{STARTS[start][target]}-{target}_{share}-"
    return np.array([scores[name][target]["iou"] for name in sorted(scores) if unit in name])


columns = [(target, share) for target in TARGETS for share in LABELS]
print("| start | " + " | ".join(f"{TARGETS[t]}, {share} %" for t, share in columns) + " | seeds |")
print("|---" * (len(columns) + 2) + "|")
means = np.zeros((len(STARTS), len(columns)))
for row, start in enumerate(STARTS):
    found = [ious(start, *column) for column in columns]
    means[row] = [own.mean() for own in found]
    cells = [f"{own.mean():.3f} ± {own.std(ddof=1):.3f}" for own in found]
    print(f"| {start} | {' | '.join(cells)} | {len(found[0])} |")
for base, starts in GAINS.items():
    for start in starts:
        cells = []
        for column in columns:
            gains = ious(start, *column) - ious(base, *column)  # a seed has its patches
            gain, margin = gains.mean(), of_seeds(gains).margin(0.975)
            cells.append(f"{gain:+.3f} ({gain - margin:+.3f} to {gain + margin:+.3f})")
        print(f"| {start}, less {base} | {' | '.join(cells)} | |")

figure, axes = plt.subplots(figsize=(7, 2.8))
image = axes.imshow(means, cmap="viridis", vmin=0, vmax=0.9)
for (row, column), mean in np.ndenumerate(means):
    colour = "black" if mean > 0.6 else "white"
    axes.text(column, row, f"{mean:.2f}", ha="center", va="center", color=colour, fontsize=12)
names = [f"{TARGETS[target]}\n{share} %" for target, share in columns]
axes.set_xticks(range(len(columns)), names)
axes.set_yticks(range(len(STARTS)), STARTS)
axes.set_xlabel("target, and share of its patches that have labels")
axes.set_ylabel("start")
axes.set_aspect("auto")
figure.colorbar(image, label="IoU, mean of three seeds")
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)
