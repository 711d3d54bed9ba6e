"""What cannot be done is refused before work, and it is said what was found and what to do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emadapt import api
from emadapt.data.blocks import BlockDataset
from emadapt.data.foreground import class_ids
from emadapt.data.ingest import Volume
from emadapt.data.labelled import few_slices, few_tiles
from emadapt.data.layouts import find_parts
from emadapt.domains.features import chosen_slices
from emadapt.errors import InputError
from emadapt.files import check_new_file
from emadapt.models.adapters import add_lora, cut_below
from emadapt.models.archs import resolve_blocks
from emadapt.segment import mesh
from emadapt.segment.model import find_model
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import TrainSetSettings
from emadapt.study.training import DiagnoseSettings
from emadapt.training.devices import parse_devices
from emadapt.volumes.source import array_source
from tiny import TINY, build_backbone, regime_for

SPEC = BackboneSettings(arch="tiny_dinov2", source="random", tile=48)
STACK = np.zeros((9, 60, 70), np.uint8)
MANIFEST = {"split": {"train": [*range(8)], "val": [], "test": []}, "voxel_nm": [30, 5, 5]}
VOLUME = Volume("v", STACK, STACK, MANIFEST)
EYE, FULL = np.eye(5, dtype=np.uint8), np.ones((60, 60, 60), np.uint8)


def few(**amount: int) -> TrainSetSettings:
    return TrainSetSettings(datasets=("v",), **amount)  # type: ignore[arg-type]


def patches(spec: BackboneSettings, shape: tuple[int, int, int]) -> object:
    return BlockDataset([VOLUME], spec, 16, False, patch=shape)


def seen(images: torch.Tensor) -> object:
    return build_backbone("tiny_dinov2")(images)


REFUSED: dict[str, Callable[[Path], object]] = {
    "at most 8 consecutive": lambda _: patches(SPEC, (9, 32, 32)),
    "60 x 70 pixels": lambda _: patches(SPEC.changed(tile=0), (4, 96, 96)),
    ">127 leaves none": lambda _: class_ids(EYE, [">127"]),
    "fractions": lambda _: class_ids(EYE / 2, [(1,)]),
    "at most 8": lambda _: few_slices(VOLUME, few(slices=9), 0),
    "at most 16": lambda _: few_tiles(VOLUME, few(crops=17), [(0, 0), (0, 30)], 0, [*range(8)]),
    "no such folder": lambda path: find_parts(path, "vnc", "number"),
    "found 8 slices": lambda _: chosen_slices(VOLUME, DiagnoseSettings(blocks=9)),
    "above the width 64": lambda _: add_lora(build_backbone("tiny_dinov2"), 65, 1.0, 0.0),
    "more than the 4 blocks": lambda _: cut_below(build_backbone("tiny_dinov2"), 5),
    "blocks of dinov2_s": lambda _: resolve_blocks("dinov2_s", (6, 3)),
    "dinov2_xl": lambda _: resolve_blocks("dinov2_xl", "auto"),
    "56 x 57 pixels": lambda _: seen(torch.rand(1, 1, 56, 57)),
    r"shape \(56, 56\)": lambda _: seen(torch.rand(56, 56)),
    "torch.uint8": lambda _: seen(torch.ones(1, 1, 56, 56, dtype=torch.uint8)),
    "head 'fpn'": lambda _: regime_for(TINY, head="fpn").build(0),
    "devices": lambda _: parse_devices("0,,1"),
    "FILE with .onnx": lambda path: check_new_file(path / "no/a.onnx", [".onnx"], overwrite=True),
    "nor such a unit": lambda _: find_model("t-lora-a-0"),
    "triangles.*--step": lambda _: mesh.surface(array_source(FULL, (5.0, 5.0, 5.0)), (5.0,) * 3),
    "as the mask": lambda _: api.evaluate_masks(STACK, STACK[:3], (30.0, 5.0, 5.0)),
}
"""Calls by what is said of them."""


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_is_refused(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mesh, "MOST_TRIANGLES", 1000)
    with pytest.raises(InputError, match=said) as caught:
        REFUSED[said](tmp_path)
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.do
