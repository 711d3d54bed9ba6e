"""Seconds for a slice and memory of ingest and tokens, for volumes of more and more slices."""

from __future__ import annotations

from benchmarks.timing import print_table
from benchmarks.workplace import emadapt, workplace, write_study, write_volume

SIDE = 128
TINY = {"arch": "tiny_dinov2", "tile": 64, "overlap": 0.25}


def grown(slices: int) -> dict[str, float]:
    """Of a volume of so many slices, in a folder of its own."""
    row: dict[str, float] = {"slices": slices}
    with workplace():
        write_volume("noise", slices, SIDE)
        write_study(TINY, {"frozen": {"kind": "frozen"}}, {"steps_per_epoch": 1, "epochs": 1})
        for verb in (("ingest", "noise"), ("tokens", "b", "noise")):
            taken, peak = emadapt(*verb)
            row |= {f"{verb[0]}_s": taken, f"{verb[0]}_mb": peak}
    return row


if __name__ == "__main__":
    print_table([grown(slices) for slices in (64, 256, 1024)])
