"""An epoch of a head from cached tokens, online, and as the reference study trains.

The reference study (arXiv 2602.08505) shows whole slices, one in a step, in fp32, and runs the
backbone in every epoch.
"""

from __future__ import annotations

from benchmarks.timing import print_table
from benchmarks.workplace import emadapt, train, workplace, write_study, write_volume

SLICES, SIDE, EPOCHS = 8, 504, 2
FROZEN = {"frozen": {"kind": "frozen"}}
TILES = {"arch": "dinov2_s", "overlap": 0.0}
WHOLE = {"overlap": 0.0, "tile": 0, "views": 0, "blocks": "last"}


def epoch(backbone: dict, head: str, **settings: object) -> float:
    """Seconds of an epoch of one pass over the training slices."""
    write_study(
        backbone, FROZEN, {"epochs": EPOCHS, "steps_per_epoch": 0, "head": head, **settings}
    )
    return float(train("frozen")["seconds"]) / EPOCHS


def compared(head: str, arch: str = "dinov2_s") -> dict[str, float | str]:
    """Seconds of an epoch in the three ways."""
    tiles, whole = TILES | {"arch": arch}, WHOLE | {"arch": arch}
    cached = epoch(tiles, head, cached=True)
    loop = epoch(tiles, head, cached=False)
    paper = epoch(whole, head, cached=False, batch=1, precision="fp32", augment=False)
    seconds = {"cache_s": cached, "loop_s": loop, "reference_s": paper}
    return {"head": head, **seconds, "loop": loop / cached, "reference": paper / cached}


if __name__ == "__main__":
    with workplace():
        write_volume("noise", SLICES, SIDE)
        write_study(TILES, FROZEN, {"epochs": 1})
        emadapt("ingest", "noise")
        filled, _ = emadapt("tokens", "b", "noise")
        print_table([compared(head) for head in ("linear", "pyramid")])
        print(f"filling the cache took {filled:.1f} s, start-up included")
