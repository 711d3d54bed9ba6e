"""How fast the pipeline is beside its limits: the backbone in the loop, the matrix product, a plain copy, an idle interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import median_timed, timed
from emadapt.data import prepared
from emadapt.data.blocks import PatchDataset
from emadapt.data.crops import CropDataset, Draw, crop
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.metrics.intervals import REPLICATES, block_bootstrap
from emadapt.metrics.pixels import overlap_counts, pooled
from emadapt.models.archs import BACKBONES
from emadapt.models.device import autocast, device, resolve_precision
from emadapt.models.predict import predict_slices
from emadapt.models.segmenter import build_frozen
from emadapt.models.tokens import token_views
from emadapt.study.study import (
    PAPER_INPUT,
    BackboneSettings,
    DatasetSettings,
    RegimeSettings,
    SplitSettings,
    Study,
    TrainSetSettings,
    TrainSettings,
    Unit,
)
from emadapt.training.fit import fit
from emadapt.training.train import prepare

Row = dict[str, Any]
REPEATS = 3


def cache_benchmark(
    arch: str = "dinov2_s", slices: int = 8, side: int = 504, epochs: int = 2
) -> list[Row]:
    """An epoch, validation included, from the token cache, with the frozen backbone in the loop, and as the reference trains.

    An epoch is one pass over the tiles of the training slices, or over the slices. The reference's semantics (arXiv 2602.08505,
    settings in `config.PAPER_INPUT`): whole slices, one a step, fp32, the backbone computed again in every epoch; here with the
    same head and number of epochs.

    Args:
        arch: of the backbone; its weights are random.
        slices: of a volume that is noise; an eighth of them, at least one, validate.
        side: of a slice, in pixels.
        epochs: that are timed.

    Returns:
        Rows: head; seconds an epoch of each way; ratio of the backbone in the loop to the cache, and of the reference to it;
        seconds that filling the cache took, with a first epoch, once.
    """
    rows, loop = [], TrainSettings(epochs=epochs, steps_per_epoch=0, cached=False)
    spec = BackboneSettings(arch, "random", overlap=0.0)
    own: dict[str, Any] = PAPER_INPUT | {"normalisation": "checkpoint", "longest_edge": 0}
    paper = dataclasses.replace(spec, **own)
    cached = dataclasses.replace(loop, cached=True)
    with _volumes({"noise": slices}, side) as names:
        filled, _ = timed(
            lambda: _epoch(
                _study(names, spec, dataclasses.replace(cached, head="linear", epochs=1))
            )
        )  # warm, too
        for head in ("linear", "pyramid"):
            ways = {
                "cache": _study(names, spec, dataclasses.replace(cached, head=head)),
                "loop": _study(names, spec, dataclasses.replace(loop, head=head)),
                "reference": _study(
                    names,
                    paper,
                    dataclasses.replace(loop, head=head, batch=1, precision="fp32", augment=False),
                ),
            }
            seconds = {way: _epoch(own) for way, own in ways.items()}
            ratios = {
                f"{way}_over_cache": seconds[way] / seconds["cache"]
                for way in ("loop", "reference")
            }
            rows.append(
                {
                    "head": head,
                    **{f"{way}_s": s for way, s in seconds.items()},
                    **ratios,
                    "filled_in_s": filled,
                }
            )
    return rows


def tokens_benchmark(
    archs: Sequence[str] = ("dinov2_s", "dinov2_b", "dinov2_l"), tiles: Sequence[int] = (252, 518)
) -> list[Row]:
    """Tokens of a batch of four tiles: the share of the fastest matrix product (2048 x 2048) that the backbone reaches.

    Args:
        archs: of backbones; their weights are random.
        tiles: their sides.

    Returns:
        Rows: arch; tile; precision; tiles a second; gflops a second of the backbone and of the product; share.
    """
    rows, size = [], 2048
    precision = resolve_precision("auto")
    a, b = torch.rand(2, size, size, device=device())
    with torch.inference_mode(), autocast("auto"):
        product, _ = median_timed(lambda: a @ b, 5)
    peak = 2 * size**3 / product / 1e9
    for arch in archs:
        backbone = build_frozen(BackboneSettings(arch, "random")).to(device()).eval()
        for tile in tiles:
            images = torch.rand(4, 1, tile, tile, device=device())
            with torch.inference_mode(), autocast("auto"):
                seconds, _ = median_timed(lambda: backbone(images), REPEATS)  # noqa: B023 - called at once
            rate = 4 * operations(arch, tile) / seconds / 1e9
            rows.append(
                {
                    "arch": arch,
                    "tile": tile,
                    "precision": precision,
                    "tiles_per_s": 4 / seconds,
                    "gflops": rate,
                    "product_gflops": peak,
                    "share": rate / peak,
                }
            )
    return rows


def operations(arch: str, tile: int) -> float:
    """Multiplications and additions of a backbone on one square tile: its matrix products, those of attention included.

    A block of width D on T tokens has 12 D^2 weights in its four linear layers, each used once a token, and two products of
    attention, T^2 D each; the patch embedding 3 p^2 D weights.
    """
    facts = BACKBONES[arch]
    tokens = (tile // facts.patch) ** 2 + 1
    block = 2 * tokens * 12 * facts.dim**2 + 2 * 2 * tokens**2 * facts.dim
    return float(facts.depth * block + 2 * tokens * 3 * facts.patch**2 * facts.dim)


def ingest_benchmark(slices: int = 64, side: int = 1024) -> list[Row]:
    """MB of raw data a second that `ingest` reads, checks, hashes and writes, beside a copy and the md5 of the same files."""
    with _volumes({}, side):
        _write_stack(Path("data/noise"), slices, side)
        study, size = (
            _study(("noise",), BackboneSettings("tiny_dinov2", "random"), TrainSettings()),
            2 * slices * side**2 / 1e6,
        )
        taken: dict[str, list[float]] = {"ingest": [], "copy": [], "md5": []}
        files = sorted(Path("data/noise").glob("*.tif"))
        for _ in range(REPEATS):
            taken["ingest"].append(timed(lambda: ingest(study, "noise"))[0])
            taken["copy"].append(timed(lambda: shutil.copytree("data/noise", "copied"))[0])
            shutil.rmtree("copied")
            taken["md5"].append(
                timed(lambda: [hashlib.md5(p.read_bytes(), usedforsecurity=False) for p in files])[
                    0
                ]
            )
    speed = {way: size / statistics.median(seconds) for way, seconds in taken.items()}
    return [
        {
            "mb": size,
            **{f"{way}_mb_per_s": s for way, s in speed.items()},
            "ratio": speed["ingest"] / speed["copy"],
        }
    ]


def start_benchmark() -> list[Row]:
    """What the command takes before it does anything, beside an interpreter that does nothing."""
    ways = {
        "python -c pass": ["-c", "pass"],
        "emadapt --help": ["-m", "emadapt", "--help"],
        "emadapt check --help": ["-m", "emadapt", "check", "--help"],
    }
    if Path("params.yaml").is_file():
        ways["emadapt check"] = ["-m", "emadapt", "check"]
    rows = []
    for name, words in ways.items():
        run = functools.partial(
            subprocess.run, [sys.executable, *words], capture_output=True, check=False
        )
        seconds, cpu = median_timed(run, REPEATS)
        rows.append({"command": name, "seconds": seconds, "cpu_seconds": cpu})
    return rows


def stages_benchmark(stages: int = 6) -> list[Row]:
    """What `dvc repro` adds to each stage, and what it takes where nothing is to be done: stages that start Python, no more."""
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(subprocess.run, cwd=folder, capture_output=True, check=True)
        dvc, command = [sys.executable, "-m", "dvc"], [sys.executable, "-c", "open('out', 'w')"]
        lines = [
            f"  s{i}: {{cmd: '{sys.executable} -c \"open(''o{i}'', ''w'')\"', outs: [{{o{i}: {{cache: false}}}}]}}\n"
            for i in range(stages)
        ]
        Path(folder, "dvc.yaml").write_text("stages:\n" + "".join(lines))
        run([*dvc, "init", "--quiet", "--no-scm"])
        alone = stages * median_timed(lambda: run(command), REPEATS)[0]
        first, _ = timed(lambda: run([*dvc, "repro", "--quiet"]))
        again, _ = median_timed(lambda: run([*dvc, "repro", "--quiet"]), REPEATS)
    return [
        {
            "stages": stages,
            "alone_s": alone,
            "dvc_repro_s": first,
            "nothing_to_do_s": again,
            "overhead_a_stage_s": (first - alone) / stages,
        }
    ]


def scores_benchmark(slices: int = 16, side: int = 1024, draws: int = 20) -> list[Row]:
    """The IoU of test slices and its bootstrap interval from counts per slice, against the masks themselves again and again.

    Args:
        slices: of random masks.
        side: of a slice.
        draws: resamples that the way by masks gets; milliseconds a resample are compared.

    Returns:
        One row: ms a resample of either way, their ratio, and the difference of the two IoUs of all slices, which is 0.
    """
    rng, block = np.random.default_rng(0), 4
    predicted, label = rng.random((2, slices, side, side)) < 0.1

    def by_counts() -> float:
        counts = np.array([overlap_counts(a, b) for a, b in zip(predicted, label, strict=True)])
        block_bootstrap(counts, block)
        return pooled(counts)["iou"]

    def by_masks() -> float:
        for _ in range(draws):
            chosen = np.concatenate(
                [
                    np.arange(block) + rng.integers(slices - block + 1)
                    for _ in range(slices // block)
                ]
            )
            (predicted[chosen] & label[chosen]).sum() / (predicted[chosen] | label[chosen]).sum()
        return float((predicted & label).sum() / (predicted | label).sum())

    fast, slow = (
        median_timed(by_counts, REPEATS)[0] / REPLICATES,
        median_timed(by_masks, REPEATS)[0] / draws,
    )
    return [
        {
            "slices": slices,
            "side": side,
            "counts_ms": 1000 * fast,
            "masks_ms": 1000 * slow,
            "ratio": slow / fast,
            "difference": abs(by_counts() - by_masks()),
        }
    ]


def augmentation_benchmark(side: int = 1024, tile: int = 252, crops: int = 200) -> list[Row]:
    """Training crops a second with augmentation and without, as the backbone in the loop takes them."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (2, side, side), dtype=np.uint8)

    def draw(augmented: bool) -> None:
        for seed in range(crops):
            crop(image, label, (tile, tile), seed, augmented)

    plain, augmented = (
        crops / median_timed(functools.partial(draw, how), REPEATS)[0] for how in (False, True)
    )
    return [
        {
            "tile": tile,
            "plain_per_s": plain,
            "augmented_per_s": augmented,
            "ms_a_crop": 1000 / augmented,
        }
    ]


def prepared_benchmark(side: int = 768, slices: int = 12, draws: int = 200) -> list[Row]:
    """What training draws from slices with `align: clahe` and `scale: 0.25`: from kept ones, against prepared anew each time."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (slices, side, side), dtype=np.uint8)
    volume = Volume(
        "noise",
        image,
        image % 2,
        {"split": {"train": list(range(slices))}, "voxel_nm": [5, 5, 5], "md5": ""},
    )
    spec = BackboneSettings("tiny_dinov2", "random", scale=0.25, tile=0, align="clahe")
    rows = []
    for what, depth in (("crop", 1), ("patch of 4 slices", 4)):
        cpu = []
        for kept in (prepared.KEPT_BYTES, 0):
            drawn = (
                PatchDataset([volume], spec, 16, (4, 64, 64), True)
                if depth > 1
                else CropDataset([volume], spec, 16, True)
            )
            for own in drawn.slices:
                own.free = kept
            cpu.append(timed(functools.partial(_draw, drawn, slices - depth + 1, draws))[1] / draws)
        rows.append(
            {
                "what": what,
                "kept_ms": 1000 * cpu[0],
                "anew_ms": 1000 * cpu[1],
                "ratio": cpu[1] / cpu[0],
            }
        )
    return rows


def _draw(data: CropDataset | PatchDataset, rows: int, draws: int) -> None:
    for k in range(draws):
        data[Draw(0, k % rows, k)]


def growth_benchmark(slices: Sequence[int] = (64, 256, 1024), side: int = 128) -> list[Row]:
    """Seconds a slice and peak memory of ingest, tokens and prediction with a tiny backbone, by the number of slices.

    Each in a process of its own, so that the peak is its own. `own_mb` is the peak of what is no file: pages of mapped files,
    which the kernel drops when it needs the room, are resident as well (Linux alone tells them apart; nan elsewhere).
    """
    rows = []
    for n in slices:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            seconds, cpu, peak, own = process.submit(_grow, n, side).result()
        rows.append(
            {
                "slices": n,
                "ms_a_slice": 1000 * seconds / n,
                "cpu_ms_a_slice": 1000 * cpu / n,
                "peak_mb": peak,
                "own_mb": own,
            }
        )
    first = rows[0]
    ratios = {
        "time_of_first": "cpu_ms_a_slice",
        "memory_of_first": "peak_mb",
        "own_of_first": "own_mb",
    }
    return [
        {**row, **{name: row[key] / first[key] for name, key in ratios.items()}} for row in rows
    ]


def _grow(slices: int, side: int) -> tuple[float, float, float, float]:
    spec = BackboneSettings("tiny_dinov2", "random", tile=64, overlap=0.25)
    with _volumes(
        {"warm": 8}, side
    ) as names:  # what is imported and set up at first use is not growth
        _through(_study(names, spec, TrainSettings()))
        with contextlib.chdir(tempfile.mkdtemp(dir=".")), _watched() as own:
            _write_stack(Path("data/noise"), slices, side)
            seconds, cpu = timed(lambda: _through(_study(("noise",), spec, TrainSettings())))
    return seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, max(own)


@contextlib.contextmanager
def _watched() -> Iterator[list[float]]:
    """MB of memory that is no file's, every hundredth of a second."""
    status, found, done = Path("/proc/self/status"), [math.nan], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            (line,) = [
                line for line in status.read_text().splitlines() if line.startswith("RssAnon")
            ]
            found.append(int(line.split()[1]) / 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    if status.is_file():
        found.clear()
        watcher.start()
    try:
        yield found
    finally:
        done.set()
        if watcher.ident:
            watcher.join()


def _through(study: Study) -> None:
    """Ingest, tokens, and probabilities of all test slices of one dataset."""
    (name,) = study.datasets
    ingest(study, name)
    volume, unit = open_volume(name), _unit(study)
    segmenter = prepare(study, unit).segmenter.eval()
    (view,) = token_views(segmenter.backbone, segmenter.spec, volume, range(1))
    for _ in predict_slices(segmenter, volume, volume.split["test"], view):
        pass


def _epoch(study: Study) -> float:
    """Seconds of an epoch."""
    inputs, unit = prepare(study, _unit(study)), _unit(study)
    with tempfile.TemporaryDirectory() as scratch:
        train = study.train_settings(unit)
        return (
            fit(inputs, train, unit, Path(scratch), lambda metrics, step: None).seconds
            / train.epochs
        )


def _study(names: Sequence[str], spec: BackboneSettings, train: TrainSettings) -> Study:
    n = tuple(names)
    return Study(
        name="bench",
        datasets=n,
        backbones=("b",),
        regimes=("frozen",),
        train_sets=n,
        seeds=(0,),
        dataset_settings=dict.fromkeys(n, DatasetSettings("stack", (5.0, 5.0, 5.0), (1,))),
        backbone_settings={"b": spec},
        train_set_settings={name: TrainSetSettings((name,)) for name in n},
        regime_settings={"frozen": RegimeSettings("frozen")},
        split=SplitSettings(val=0.125, test=0.25, gap_nm=0.0),
        train=train,
    )


def _unit(study: Study) -> Unit:
    return next(iter(study.units()))


@contextlib.contextmanager
def _volumes(slices: dict[str, int], side: int) -> Iterator[tuple[str, ...]]:
    """A folder of its own to work in, with ingested volumes of noise; what is said there stays there."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for name, n in slices.items():
            _write_stack(Path("data") / name, n, side)
            ingest(
                _study((name,), BackboneSettings("tiny_dinov2", "random"), TrainSettings()), name
            )
        yield tuple(slices)


def _write_stack(folder: Path, slices: int, side: int) -> None:
    import tifffile

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, high in (("image", 256), ("label", 2)):
        with tifffile.TiffWriter(folder / f"{name}.tif") as file:
            for _ in range(slices):
                file.write(
                    rng.integers(0, high, (side, side), dtype=np.uint8),
                    photometric="minisblack",
                    contiguous=True,
                )
