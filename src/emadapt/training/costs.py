"""What training a model took: seconds and memory.

They differ from run to run, so they are in no file that git or DVC follows. They are kept by the
unit's key, which its copies share, and MLflow has them as well.
"""

from __future__ import annotations

import json
from pathlib import Path

from emadapt.files import write_json

COSTS = Path("scratch/costs")


def note_cost(key: str, seconds: float, peak_mb: float) -> None:
    """Keep what training the model of a unit took."""
    cost = {"seconds": round(seconds, 2), "peak_mb": round(peak_mb, 1)}
    write_json(COSTS / f"{key}.json", cost)


def cost_of(key: str, root: Path = Path()) -> dict[str, float]:
    """`seconds` and `peak_mb`; empty if the model was trained elsewhere."""
    try:
        return dict(json.loads((root / COSTS / f"{key}.json").read_text()))
    except (OSError, ValueError):
        return {}
