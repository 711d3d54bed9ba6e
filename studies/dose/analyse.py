"""Draw results/answer.png and print the README's tables from results/summary.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FOUND = json.loads((RESULTS / "summary.json").read_text())["dose_response"]
DIALS = {
    "contrast": "#0072b2",
    "noise": "#e69f00",
    "blur": "#009e73",
    "voxel": "#000000",
    "texture": "#cc79a7",
}
REGIMES = {"frozen": "frozen", "lora": "LoRA"}
DISTANCES = {
    "knn_iou_loss": "labels carried over by nearest neighbours (needs labels)",
    "probe": "domain probe",
    "fd_token": "Fréchet distance of tokens",
    "mmd2": "MMD",
    "outlier_auroc": "outlier AUROC",
    "knn_unmixing": "mixing of neighbours",
    "fd_image": "Fréchet distance, one vector a slice",
}

figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for axes, (regime, title) in zip(panels, REGIMES.items(), strict=True):
    for dial, colour in DIALS.items():
        points = [p for p in FOUND["points"] if (p["regime"], p["dial"]) == (regime, dial)]
        x = [point["distances"]["fd_token"] for point in points]
        axes.plot(x, [p["loss"] for p in points], "-", color=colour, alpha=0.4)
        for point, distance in zip(points, x, strict=True):
            size = 5 if point["dose"] < 1 else 9
            label = dial.replace("voxel", "pixel size") if point["dose"] == 1 else None
            axes.plot(distance, point["loss"], "o", color=colour, ms=size, label=label)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_title(title)
    axes.set_xlabel("Fréchet distance of tokens (shares of variance)")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("foreground IoU lost")
panels[1].legend(
    frameon=False, title="small: half\nlarge: full", loc="center left", bbox_to_anchor=(1, 0.5)
)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)

print("| distance | rho, frozen | rho, LoRA |\n|---|---|---|")
for distance, name in DISTANCES.items():
    rho = {
        c["regime"]: c["rho"]
        for c in FOUND["correlations"]
        if (c["distance"], c["dial"]) == (distance, None)
    }
    print(f"| {name} | {rho['frozen']:.2f} | {rho['lora']:.2f} |")
