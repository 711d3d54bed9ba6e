"""Draw results/answer.png and print the README's tables; with an archive, the pixels' AUROC, too.

python studies/pneumonia/analyse.py [pneumoniamnist.npz]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

STUDIES = Path(__file__).parents[1]
COUNTS = (1, 2, 4, 8, 16, 32, 64)
FEW = {"frozen": ("linear probe", "#0072b2", "o"), "knn": ("20 neighbours", "#e69f00", "s")}


def units(study: str) -> list[dict]:
    """`units` of a study's kept summary."""
    return json.loads((STUDIES / study / "results/summary.json").read_text())["units"]


def cell(score: dict) -> str:
    """A score with its interval."""
    return f"{score['mean']:.3f} ({score['ci95'][0]:.3f} to {score['ci95'][1]:.3f})"


NAMES = {
    "knn": "20 neighbours",
    "frozen": "linear probe",
    "lora": "LoRA",
    "bitfit": "BitFit",
    "full": "all of the backbone",
}
print(
    "| all 4,708 images | AUROC | accuracy | balanced accuracy | trained parameters |"
    " of the backbone | seconds |"
)
print("|---|---|---|---|---|---|---|")
for unit in units("pneumonia"):
    scores = [cell(unit[name]) for name in ("auroc", "accuracy", "balanced_accuracy")]
    share = f"{unit['trainable_params']:,} | {unit['backbone_share']:.2%} | {unit['seconds']:.0f}"
    print(f"| {NAMES[unit['regime']]} | {' | '.join(scores)} | {share} |")

figure, axes = plt.subplots(figsize=(7, 3.6))
print("| images of each class, AUROC | " + " | ".join(map(str, COUNTS)) + " |")
print("|---" * (len(COUNTS) + 1) + "|")
for regime, (label, colour, marker) in FEW.items():
    own = {u["train_set"]: u["auroc"] for u in units("pneumonia_few") if u["regime"] == regime}
    found = [own[f"few_{n}"] for n in COUNTS]
    axes.plot(COUNTS, [score["mean"] for score in found], marker, ls="-", color=colour, label=label)
    for n, score in zip(COUNTS, found, strict=True):
        axes.plot([n] * len(score["values"]), score["values"], "_", color=colour, ms=9)
    print(f"| {label} | " + " | ".join(f"{s['mean']:.3f} ± {s['std']:.3f}" for s in found) + " |")
    whole = next(u["auroc"]["mean"] for u in units("pneumonia") if u["regime"] == regime)
    axes.axhline(whole, color=colour, ls="--", lw=1)
axes.set_xscale("log")
axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
axes.minorticks_off()
axes.set_xlabel("labelled images of each class (dashed: all 4,708 images)")
axes.set_ylabel("AUROC (dashes: seeds)")
axes.grid(alpha=0.3)
axes.legend(frameon=False, loc="lower right", fontsize=9)
figure.tight_layout()
figure.savefig(STUDIES / "pneumonia/results/answer.png", dpi=110)

for archive in [name for name in sys.argv[1:] if name.endswith(".npz")]:
    arrays = np.load(archive)
    images, classes, shown, truth = (
        arrays[f"{part}_{what}"].reshape(len(arrays[f"{part}_{what}"]), -1).astype(float)
        for part in ("train", "test")
        for what in ("images", "labels")
    )
    model = KNeighborsClassifier(20).fit(images, classes.ravel())
    auroc = roc_auc_score(truth.ravel(), model.predict_proba(shown)[:, 1])
    print(f"20 nearest neighbours of raw pixels: AUROC {auroc:.3f}")
