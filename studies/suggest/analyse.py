"""Draw results/answer.png and print the README's tables from what score.py kept."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"
SHOWN = [1, 2, 3, 4, 6, 8]
COLOURS = dict(
    zip(
        ("evenly spaced", "random", "covering the tokens", "most doubtful"),
        ("#000000", "#999999", "#0072b2", "#d55e00"),
        strict=True,
    )
)
TITLES = {"lucchi": "Lucchi, of 48 slices", "vnc": "VNC, of 12 sections"}

scores = json.loads((RESULTS / "scores.json").read_text())
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for axes, (name, ways) in zip(panels, scores.items(), strict=True):
    print(f"| {TITLES[name]} | " + " | ".join(map(str, SHOWN)) + " |")
    print("|---" * (len(SHOWN) + 1) + "|")
    for way, colour in COLOURS.items():
        rows = np.asarray(ways[way])
        mean, error = rows.mean(0), rows.std(0, ddof=1)
        axes.plot(range(1, 9), mean, marker="o", ms=4, color=colour, label=way)
        axes.fill_between(range(1, 9), mean - error, mean + error, color=colour, alpha=0.1, lw=0)
        cells = [f"{mean[n - 1]:.3f} ± {error[n - 1]:.3f}" for n in SHOWN]
        print(f"| {way} | " + " | ".join(cells) + " |")
    axes.axhline(ways["all"][0][0], ls=":", color="black", lw=1)
    axes.set_title(TITLES[name])
    axes.set_xlabel("labelled slices")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("IoU of tokens (bands: ± one s.d.)")
panels[1].legend(frameon=False, loc="lower right", fontsize=9)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)
