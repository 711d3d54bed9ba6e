"""Published systems of other packages as baselines: what MitoNet and SAM 2 have in common.

For everything that predicts, saves and loads, such a system is a segmenter without a backbone: it stands where the backbone
would, hands on logits, and its head passes them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import torch
import torch.nn.functional as F
from torch import nn

from emadapt.errors import InputError
from emadapt.models.archs import Arch
from emadapt.models.unet2d import NoBackbone
from emadapt.study.study import BackboneSettings, RegimeSettings

PACKAGES = {
    "mitonet": ("empanada", "--no-deps empanada-dl==0.1.7"),
    "sam2": ("transformers", "transformers>=5.23,<6"),
}
"""Module and what pip is told to install. empanada-dl pins a numpy that is years old; its models need torch and numpy alone."""


class Outside(NoBackbone):
    """A network of another package; `vit` is the network. Always in eval mode: its batch statistics are those of its authors."""

    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        self.arch_name, self.stride = name, stride
        self.arch = Arch("none", "none", stride, 1, 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None)

    def train(self, mode: bool = True) -> Outside:
        return super().train(False)


class Passed(nn.Module):
    """The head behind such a network: its logits (B, 2, H, W) as they are, resized where another size is asked for."""

    def __init__(self, dim: int, n_blocks: int) -> None:
        super().__init__()

    def forward(self, tokens: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        logits = tokens[0].float()
        return (
            logits
            if logits.shape[-2:] == size
            else F.interpolate(logits, size, mode="bilinear", align_corners=False)
        )


def two_classes(logits: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) logits of foreground -> (B, 2, H, W), whose softmax has their sigmoid as foreground."""
    return torch.cat([torch.zeros_like(logits), logits], 1)


def own_spec(spec: BackboneSettings, regime: RegimeSettings, multiple: int) -> BackboneSettings:
    """The backbone's input settings for an outside system: whole slices, as its authors feed it, downsampled by `factor`.

    While all of it is trained it sees tiles, rounded up to `multiple`.
    """
    tile = -(-spec.tile // multiple) * multiple if regime.finetune else 0
    return dataclasses.replace(spec, context=0, longest_edge=0, scale=1 / regime.factor, tile=tile)


def check_package(kind: str) -> None:
    """Refuse where the package of a regime is not installed.

    Raises:
        InputError: it is not.
    """
    module, requirement = PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"regime {kind}",
            found=f"no package {module}",
            expected=f"it in the environment of {sys.executable}",
            do=f"Run `{sys.executable} -m pip install {requirement}`.",
        )
