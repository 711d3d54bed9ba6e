"""Put the trained unit of this study into the package, as the model that ships.

`python studies/starter/pack.py`, after `emadapt use starter && emadapt repro`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from emadapt.files import write_text
from emadapt.segment.shipped import SHIPPED, STARTER
from emadapt.training.model_card import EVALUATED

UNIT = "dinov2_s-lora-synthetic-0"
CHOSEN = {
    "threshold": 0.6,
    "second_pixel_nm": 4.5,
    "chosen_on": "Lucchi's training half, and all of VNC",
}
"""What was settled on real data, and on which (README.md)."""
SMOOTH_Z_NM = 30.0
"""Over so many nm the model that ships averages along z. Training has no neighbouring slices."""


def main() -> None:
    """Copy the weights, the card with `CHOSEN`, and the scores."""
    source, target = Path("build/units") / UNIT, SHIPPED / STARTER
    card = json.loads((source / "model.json").read_text()) | CHOSEN
    card["backbone"]["smooth_z_nm"] = SMOOTH_Z_NM
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "model.json", json.dumps(card, indent=1, sort_keys=True) + "\n")
    shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    shutil.copyfile(EVALUATED / UNIT / "metrics.json", target / "metrics.json")
    print(f"{target}; next: python studies/starter/score.py")


if __name__ == "__main__":
    main()
