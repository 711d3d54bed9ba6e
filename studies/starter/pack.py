"""Put a trained and evaluated unit into the package, as a model that ships.

python studies/starter/pack.py UNIT NAME THRESHOLD

THRESHOLD is the probability above which masks of the model have foreground.
"""

import json
import shutil
import sys

from emadapt.files import write_text
from emadapt.segment.shipped import SHIPPED, UNITS
from emadapt.training.model_card import EVALUATED, metrics_of

unit, name, threshold = sys.argv[1:]
source, target = UNITS / unit, SHIPPED / name
card = json.loads((source / "model.json").read_text())
if not metrics_of(source, card):
    sys.exit(f"{source}: no scores of this model. Run `emadapt evaluate {unit}`.")
target.mkdir(parents=True, exist_ok=True)
text = json.dumps(card | {"threshold": float(threshold)}, indent=1, sort_keys=True)
write_text(target / "model.json", f"{text}\n")
shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
for file in ("metrics.json", "model-card.md"):
    shutil.copyfile(EVALUATED / unit / file, target / file)
