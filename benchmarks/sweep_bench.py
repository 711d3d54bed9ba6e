"""How many frozen trials an hour: heads one at a time against heads in a stack, on tokens of a ViT-S/14 that are made up."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import timed
from emadapt.data.crops import TokenDataset
from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry
from emadapt.models.device import device
from emadapt.models.segmenter import Segmenter, build_frozen
from emadapt.models.tokens import TokenView
from emadapt.study.study import BackboneSettings, RegimeSettings, TrainSettings, Unit
from emadapt.sweep.fit_stacked import Member, fit_stacked
from emadapt.training.fit import Inputs, fit, score

SPEC = BackboneSettings(arch="dinov2_s", source="random", tile=252, overlap=0.4, views=0)
SLICES, SIDE, VALIDATION = 28, 504, 4


def stacked_heads_benchmark(
    members: int = 8, epochs: int = 2, steps: int = 15
) -> list[dict[str, Any]]:
    """Trials an hour of whole trials (training, a validation each epoch, the final score), by head.

    Both sides read the same cached tokens with the same settings. What a trial costs besides, on one side only (building the
    backbone, opening its run), is left out, so the ratio is a lower bound.

    Args:
        members: heads of the stack; a quarter as many, at least one, are timed one at a time.
        epochs: of a trial.
        steps: of an epoch.

    Returns:
        Rows: head; members; alone_per_hour and stacked_per_hour; their ratio; cpu_time_ratio, of processor time, which another
        load on the machine does not change.
    """
    train = TrainSettings(
        epochs=epochs, steps_per_epoch=steps, val_slices=VALIDATION, precision="fp32"
    )
    settings = [dataclasses.replace(train, head_lr=1e-3 * 1.1**k) for k in range(members)]
    rows = []
    for head in ("linear", "pyramid"):
        with tempfile.TemporaryDirectory() as folder:
            inputs, scratch = _inputs(head), Path(folder)
            for run in (
                _alone,
                _stacked,
            ):  # what is imported and set up at first use is nobody's time
                run(
                    inputs,
                    [dataclasses.replace(train, epochs=1, steps_per_epoch=1)],
                    scratch / "warm-up",
                )
            some = settings[: max(1, members // 4)]
            one, one_cpu = timed(lambda: _alone(inputs, some, scratch))  # noqa: B023 - called at once
            every, every_cpu = timed(lambda: _stacked(inputs, settings, scratch))  # noqa: B023
        ratio = len(settings) / len(some)
        rows.append(
            {
                "head": head,
                "members": members,
                "alone_per_hour": 3600 * len(some) / one,
                "stacked_per_hour": 3600 * len(settings) / every,
                "ratio": ratio * one / every,
                "cpu_time_ratio": ratio * one_cpu / every_cpu,
            }
        )
    return rows


def _alone(inputs: Inputs, settings: list[TrainSettings], scratch: Path) -> None:
    for k, train in enumerate(settings):
        fresh = Segmenter(
            SPEC, RegimeSettings("frozen"), inputs.segmenter.head_name, 0, inputs.segmenter.backbone
        ).to(device())
        own = dataclasses.replace(inputs, segmenter=fresh)
        fit(
            own,
            train,
            Unit("bench", "frozen", "made_up", 0),
            scratch / f"alone-{k}",
            lambda metrics, step: None,
        )
        score(own.segmenter, own.volumes, own.views, every=0)


def _stacked(inputs: Inputs, settings: list[TrainSettings], scratch: Path) -> None:
    fit_stacked(
        inputs,
        [
            Member(s, 0, scratch / f"stacked-{k}", lambda metrics, step: None)
            for k, s in enumerate(settings)
        ],
        0,
    )


def _inputs(head: str) -> Inputs:
    """A volume of noise with its tokens, as the cache would give them."""
    rng = np.random.default_rng(0)
    segmenter = Segmenter(SPEC, RegimeSettings("frozen"), head, 0, build_frozen(SPEC)).to(device())
    split = {
        "train": list(range(SLICES - VALIDATION)),
        "val": list(range(SLICES - VALIDATION, SLICES)),
        "test": [],
    }
    label = (rng.random((SLICES, SIDE, SIDE)) > 0.9).astype(np.uint8)
    volume = Volume("made_up", np.zeros_like(label), label, {"split": split, "md5": ""})
    geo = geometry((SIDE, SIDE), SPEC, segmenter.backbone.arch.patch)
    index = [(z, y, x) for z in split["train"] for y, x in geo.corners(0.0)]
    index += [(z, y, x) for z in split["val"] for y, x in geo.corners()]
    labels = np.stack([np.resize(label[z], geo.tile) for z, _, _ in index])
    cells = tuple(side // segmenter.backbone.arch.patch for side in geo.tile)
    channels = segmenter.backbone.arch.dim * len(segmenter.backbone.blocks)
    tokens = np.resize(
        rng.standard_normal((4, channels, *cells), dtype=np.float32).astype(np.float16),
        (len(index), channels, *cells),
    )
    views = [[TokenView(tokens, labels, np.asarray(index, np.int32), split)]]
    return Inputs(segmenter, [volume], views, TokenDataset(views))
