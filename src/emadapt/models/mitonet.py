"""MitoNet (Conrad & Narayan 2023, Cell Systems 14:58) through its authors' empanada-dl.

Only its foreground is used, not the centres and offsets from which it makes objects: objects of all
models are connected components here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emadapt.errors import InputError
from emadapt.files import sha256_of
from emadapt.models.convert import read_state
from emadapt.models.published import Published, check_package, two_classes
from emadapt.models.weights import Provenance

MEAN, STD = 0.57571, 0.12765
"""Of grey values in [0, 1], from empanada-napari."""
TILE = 128
"""Tiles of a fine-tuned network are multiples of it, which suits both architectures."""
POINT_REND: dict[str, Any] = {"num_fc": 3, "subdivision_steps": 2, "subdivision_num_points": 8192}
DEEPLAB: dict[str, Any] = {
    "encoder": "resnet50",
    "num_classes": 1,
    "stage4_stride": 16,
    "decoder_channels": 256,
    "low_level_stages": [1],
    "low_level_channels_project": [32],
    "atrous_rates": [2, 4, 6],
    "aspp_channels": None,
    "aspp_dropout": 0.5,
    "ins_decoder": True,
    "ins_ratio": 0.5,
    **POINT_REND,
}
"""MitoNet_v1; slices are padded to multiples of 16."""
BIFPN: dict[str, Any] = {
    "encoder": "resnet50",
    "num_classes": 1,
    "fpn_dim": 128,
    "fpn_layers": 3,
    "ins_decoder": True,
    "depthwise": True,
    **POINT_REND,
}
"""MitoNet_v1_mini; to multiples of 128."""
DO = (
    "Get MitoNet_v1.pth from https://zenodo.org/record/6861565. It is a TorchScript archive, a "
    "program, which emadapt does not run. On a machine where you trust it, run "
    "`python -c \"import torch; torch.save(torch.jit.load('MitoNet_v1.pth', "
    "map_location='cpu').state_dict(), 'mitonet.pt')\"` and give that file as `weights`."
)


class MitoNet(Published):
    """MitoNet_v1 or MitoNet_v1_mini, whichever the tensors of a file belong to.

    Raises:
        InputError: no package, no such file, or tensors that are not exactly those of one of the
            two.
    """

    def __init__(self, path: Path) -> None:
        check_package("mitonet")
        state = _read(path)
        small = any(name.startswith("semantic_fpn.") for name in state)
        network = _network(small)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(
                path,
                found=" ".join(str(error).split())[:200],
                do=DO,
                expected="all tensors of MitoNet_v1 or MitoNet_v1_mini, and no other",
            ) from error
        note = f"MitoNet, {type(network).__name__} of empanada-dl"
        provenance = Provenance("file", str(path), sha256_of(path), note)
        super().__init__("mitonet", 128 if small else 16, network, provenance)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 1, H, W) in [0, 1] -> one (B, 2, H, W) of logits, in float32 throughout.

        PointRend's refinement writes into its own copy of the logits, which mixed precision would
        give another type.
        """
        with torch.autocast(images.device.type, enabled=False):
            return [two_classes(self.network((images.float() - MEAN) / STD)["sem_logits"])]


def check(path: Path) -> None:
    """Raise what building it would raise, as far as the names in the file show it."""
    check_package("mitonet")
    _read(path, values=False)


def _read(path: Path, values: bool = True) -> dict[str, torch.Tensor]:
    """State dict of the file, whose names are like MitoNet's."""
    try:
        state = read_state(path, values)
    except InputError as error:
        raise InputError(
            f"weights {path} of regime mitonet", found=error.found, expected=error.expected, do=DO
        ) from error
    if not any(name.startswith("semantic_pr.point_head.") for name in state):
        raise InputError(
            path,
            found="tensors of another network",
            expected="those of MitoNet_v1 or MitoNet_v1_mini",
            do=DO,
        )
    return state


def _network(small: bool) -> Any:
    from empanada.models import PanopticBiFPNPR, PanopticDeepLabPR

    return PanopticBiFPNPR(**BIFPN) if small else PanopticDeepLabPR(**DEEPLAB)
