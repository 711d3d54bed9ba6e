"""What a GPU changes: parity with the CPU, speeds as shares of the peak, memory, a sweep.

`benchmarks/gpu.sh` runs it; `--small` takes tiny networks, on which a test runs all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from benchmarks import cache
from benchmarks.regimes import by_emadapt, by_peft
from benchmarks.timing import print_table, seconds
from benchmarks.tokens import operations, product_speed
from benchmarks.workplace import emadapt, train, workplace, write_study, write_volume
from emadapt.models.archs import BACKBONES
from emadapt.models.backbones import pretrained
from emadapt.models.device import autocast, device
from emadapt.models.heads import HEADS
from emadapt.study.backbones import BackboneSettings

ROOT = Path(__file__).resolve().parents[1]
LORA = {"lora": {"kind": "lora"}}
Row = dict[str, Any]
"""`what`, `value`, `unit`; `ratio` to what `of` names, 0 without."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    archs: tuple[str, ...]
    large: str
    tiles: tuple[int, ...]
    batches: tuple[int, ...]
    compiled: tuple[int, ...]
    heads: tuple[str, ...]
    product: int
    compiler: str
    voxels: tuple[int, int, int]
    trials: int
    workers: tuple[int, ...]
    demo: bool


LARGE = Size(
    archs=(
        *("dinov2_s", "dinov2_b", "dinov2_l"),
        *("dinov3_s", "dinov3_b", "dinov3_l"),
        *("openclip_b16", "openclip_l14"),
    ),
    large="dinov2_l",
    tiles=(518, 1022),
    batches=(1, 4, 16, 64),
    compiled=(1, 16),
    heads=("linear", "pyramid"),
    product=8192,
    compiler="inductor",
    voxels=(16, 2048, 2048),
    trials=8,
    workers=(1, 4),
    demo=True,
)
SMALL = Size(
    archs=("tiny_dinov2", "tiny_dinov3", "tiny_openclip"),
    large="tiny_dinov2",
    tiles=(56,),
    batches=(1, 2),
    compiled=(2,),
    heads=("linear",),
    product=256,
    compiler="eager",
    voxels=(2, 70, 70),
    trials=2,
    workers=(2,),
    demo=False,
)


def row(what: str, value: float, unit: str, ratio: float = 0.0, of: str = "") -> Row:
    """A row of a table."""
    return {"what": what, "value": value, "unit": unit, "ratio": ratio, "of": of}


def setup(size: Size) -> Iterator[Row]:
    """Speed of products in each precision, and of copies to the device."""
    plain = product_speed(size.product, "fp32")
    for precision in ("fp32", "bf16", "fp16"):
        speed = product_speed(size.product, precision)
        yield row(f"product, {precision}", speed / 1e12, "TFLOP/s", speed / plain, "fp32")
    values = torch.rand(size.product, size.product)
    slow = seconds(lambda: values.to(device(), copy=True))
    yield row("copy to the device", values.nbytes / slow / 1e9, "GB/s")
    if torch.cuda.is_available():
        pinned = values.pin_memory()
        fast = seconds(lambda: pinned.to(device(), non_blocking=True))
        yield row("copy, pinned", values.nbytes / fast / 1e9, "GB/s", slow / fast, "not pinned")


def parity(size: Size) -> Iterator[Row]:
    """Tokens in half precision here, against fp32 on the CPU: relative error of the worst block."""
    for arch in size.archs:
        backbone = pretrained(BackboneSettings(arch=arch, source="random"))
        side = 8 * BACKBONES[arch].patch
        images = torch.rand(2, 1, side, side, generator=torch.manual_seed(0))
        with torch.inference_mode():
            exact = backbone(images)
            backbone.to(device())
            for precision in ("bf16", "fp16"):
                with autocast(precision):
                    found = [tokens.float().cpu() for tokens in backbone(images.to(device()))]
                pairs = zip(found, exact, strict=True)
                error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
                yield row(f"{arch}, {precision}", error, "relative error")


def tokens(size: Size) -> Iterator[Row]:
    """Tiles in a second, and the share of the speed of a bf16 product; compiled and not.

    Each shape is compiled by itself, in the call that `seconds` does not count.
    """
    peak = product_speed(size.product, "bf16")
    backbone = pretrained(BackboneSettings(arch=size.large, source="random")).to(device())
    compiled: Any = torch.compile(backbone, backend=size.compiler, dynamic=False)
    tile = size.tiles[0]
    for way, network, batches in (
        ("", backbone, size.batches),
        (", compiled", compiled, size.compiled),
    ):
        for batch in batches:
            images = torch.rand(batch, 1, tile, tile, device=device())
            with torch.inference_mode(), autocast("bf16"):
                speed = batch / seconds(lambda: network(images), 3)  # noqa: B023
            share = speed * operations(size.large, tile) / peak
            yield row(f"{size.large}, batch {batch}{way}", speed, "tiles/s", share, "bf16 product")


def formats(size: Size) -> Iterator[Row]:
    """Forward and backward of the head `pyramid` in bf16, with channels first and last."""
    facts, tile = BACKBONES[size.large], size.tiles[0]
    head = HEADS["pyramid"](facts.dim, 4, 2).to(device())
    shape = (4, facts.dim, tile // facts.patch, tile // facts.patch)
    tokens = [torch.rand(shape, device=device()) for _ in range(4)]
    first = 0.0
    for name, layout in (("first", torch.contiguous_format), ("last", torch.channels_last)):
        head.to(memory_format=layout)
        given = [part.contiguous(memory_format=layout) for part in tokens]

        def step(given: list[torch.Tensor] = given) -> None:
            with autocast("bf16"):
                logits = head(given, (tile, tile))
            logits.sum().backward()

        taken = seconds(step)
        first = first or taken
        yield row(f"pyramid, channels {name}", taken, "s", first / taken, "channels first")


def steps(size: Size) -> Iterator[Row]:
    """A training step with LoRA and of all weights, and LoRA in a plain loop of timm and peft."""
    for tile in size.tiles:
        plain = by_peft(size.large, tile, "bf16")
        name = f"{size.large}, {tile} pixels"
        rows = by_emadapt(size.large, tile, LORA | {"full": {"kind": "full"}})
        for found in (plain, *rows):
            ratio, of = plain["seconds"] / found["seconds"], "timm and peft"
            yield row(f"{name}: {found['regime']}", found["seconds"], "s", ratio, of)
            share = found["peak_mb"] / plain["peak_mb"]
            yield row(f"{name}: {found['regime']}, memory", found["peak_mb"], "MB", share, of)


def epochs(size: Size) -> Iterator[Row]:
    """An epoch of a head from the token cache, and with the backbone in the loop."""
    with workplace():
        write_volume("noise", cache.SLICES, cache.SIDE)
        write_study(cache.TILES | {"arch": size.large}, cache.FROZEN, {"epochs": 1})
        emadapt("ingest", "noise")
        emadapt("tokens", "b", "noise")
        for head in size.heads:
            found = cache.compared(head, size.large)
            for way in ("loop", "reference"):
                ratio = found[way]
                yield row(f"{head}, {way}", found[f"{way}_s"], "s", ratio, "cached tokens")  # type: ignore[arg-type]


def segment(size: Size) -> Iterator[Row]:
    """Voxels in a second of `emadapt segment`, and a sweep with one worker and with several."""
    with workplace():
        write_volume("noise", 24, 2 * size.tiles[0])
        settings = {"steps_per_epoch": 2, "epochs": 1, "val_slices": 1}
        write_study({"arch": size.large, "tile": size.tiles[0]}, LORA, settings)
        emadapt("ingest", "noise")
        train("lora")
        volume = np.random.default_rng(0).integers(0, 256, size.voxels, dtype=np.uint8)
        tifffile.imwrite("in.tif", volume, photometric="minisblack")
        words = ("--model", "b-lora-noise-0", "--voxel-nm", "5", "5", "5")
        taken, _ = emadapt("segment", "in.tif", "out.tif", *words)
        yield row("emadapt segment, start included", volume.size / taken / 1e6, "million voxels/s")
        search = ("--backbone", "b", "--regime", "lora", "--train-set", "noise")
        alone = 0.0
        for workers in size.workers:
            more = ("--trials", str(size.trials), "--workers", str(workers))
            taken, _ = emadapt("sweep", "run", *search, *more, "--name", f"w{workers}")
            alone = alone or taken
            yield row(f"sweep, workers: {workers}", taken, "s", alone / taken, "the first sweep")


def demo(size: Size) -> Iterator[Row]:
    """A frozen and a LoRA unit of the embedded study; IoU, and what the CPU's was."""
    if not size.demo:
        return
    known = json.loads((ROOT / "reports/summary.json").read_text())["units"]
    with workplace():
        os.symlink(ROOT / "data", "data")
        shutil.copy(ROOT / "studies/demo/study.yaml", "params.yaml")
        for name in ("phantom_fib", "phantom_tem"):
            emadapt("ingest", name)
        for regime in ("frozen", "lora"):
            unit = f"dinov2_s-{regime}-paired-0"
            taken = emadapt("train", unit)[0] + emadapt("evaluate", unit)[0]
            yield row(f"{unit}, train and evaluate", taken, "s")
            scores = json.loads(Path(f"build/evaluate/{unit}/metrics.json").read_text())["test"]
            for name, found in scores.items():
                wanted = {"regime": regime, "train_set": "paired", "test_set": name}
                cpu = [u["iou"]["mean"] for u in known if wanted.items() <= u.items()]
                ratio = found["iou"] / cpu[0] if cpu else 0.0
                yield row(f"{unit} on {name}", found["iou"], "IoU", ratio, "reports/")


SECTIONS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "setup": setup,
    "parity": parity,
    "tokens": tokens,
    "formats": formats,
    "steps": steps,
    "segment": segment,
    "demo": demo,
    "epochs": epochs,
}


def measured(size: Size, names: list[str], out: Path) -> None:
    """Print and write the rows of sections, each when it is done. One that fails is a row, too."""
    rows: list[Row] = []
    facts = {"torch": torch.__version__, "device": "CPU"}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    print(facts)
    for name in names:
        started = time.perf_counter()
        try:
            found = list(SECTIONS[name](size))
        except Exception as error:  # a device of another kind may refuse anything
            found = [row(f"failed: {type(error).__name__}: {error}"[:300], 0.0, "")]
        found.append(row("took", time.perf_counter() - started, "s"))
        rows += [{"section": name, **one} for one in found]
        print_table([one for one in rows if one["section"] == name])
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1))


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all without")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    order = parser.parse_args()
    size = SMALL if order.small else LARGE
    measured(size, order.sections or list(SECTIONS), order.out.absolute())


if __name__ == "__main__":
    main()
