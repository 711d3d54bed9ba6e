"""Published systems of other packages as baselines: what MitoNet and SAM 2 have in common.

Such a system takes the place of a backbone and hands on logits, which its head passes through.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from torch import nn

from emadapt.errors import InputError
from emadapt.models.heads import at_size
from emadapt.models.passthrough import PassThrough
from emadapt.models.weights import Provenance

PACKAGES = {
    "mitonet": ("empanada", "--no-deps empanada-dl==0.1.7"),
    "sam2": ("transformers", "transformers>=5.23,<6"),
}
"""Module, and what pip installs. Without dependencies: empanada-dl pins an old numpy."""

WHOLE = {"context": 0, "views": 0, "longest_edge": 0}
"""Settings of a backbone for slices as the systems take them."""


class Published(PassThrough):
    """A network of another package. Always in eval mode, with its authors' batch statistics.

    Args:
        name: of the system.
        multiple: sides of tiles are multiples of it.
        network: with its weights.
        provenance: of the weights.
    """

    network: nn.Module

    def __init__(
        self, name: str, multiple: int, network: nn.Module, provenance: Provenance
    ) -> None:
        super().__init__(multiple)
        self.arch_name, self.network, self.provenance = name, network, provenance

    def train(self, mode: bool = True) -> Published:
        return super().train(False)


class Passed(nn.Module):
    """Passes the logits (B, 2, H, W) of such a network on, resized if need be."""

    def forward(self, tokens: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return at_size(tokens[0].float(), size)


def two_classes(logits: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) logits of foreground -> (B, 2, H, W) with the same probabilities."""
    return torch.cat([torch.zeros_like(logits), logits], 1)


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
