"""Nearest neighbours of cached tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from emadapt.models.nearest import Nearest
from emadapt.models.tokens import TokenView
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.regimes.at_once import AtOnce, choose, report, tokens_and_classes

BANK = 10_000
"""Training tokens that a token is compared with."""
KS = (3, 5, 10, 20, 40)


class Knn(AtOnce):
    """A bank of training tokens, and the classes of their patches."""

    def head(self, backbone: Any, n_logits: int) -> Nearest:
        return Nearest(backbone.arch.dim, len(backbone.blocks), n_logits)

    def fit(self, inputs: Inputs, scratch: Path, on_epoch: OnEpoch) -> Progress:
        started = time.perf_counter()
        head = cast(Nearest, inputs.segmenter.head)
        tokens, classes = draw_bank(inputs.views, inputs.unit.seed)
        head.fill(tokens, classes, tokens.mean(0), tokens.std(0).clamp_min(1e-6))
        choice = choose(inputs, lambda found: head.shares(found, KS))
        head.k.fill_(KS[choice.i])
        head.threshold.copy_(torch.from_numpy(choice.thresholds.squeeze()))
        head.slope.copy_(torch.from_numpy(choice.slopes.squeeze()))
        return report(choice, "knn/k", KS, started, on_epoch)


def draw_bank(
    views: Sequence[Sequence[TokenView]], seed: int, size: int = BANK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training tokens (n, D) and classes (n,), as many of each dataset and slice.

    They are drawn by the seed from the plain view. Slices that have too few tokens give all of
    them.
    """
    tokens, classes = [], []
    for number, own in enumerate(views):
        plain = own[0]
        slices = plain.split["train"]
        shares = np.diff(np.linspace(0, size // len(views), len(slices) + 1).round().astype(int))
        for z, share in zip(slices, shares, strict=True):
            found, filled = tokens_and_classes(plain, plain.rows_of_slice(z))
            rng = np.random.default_rng([seed, number, z])
            drawn = np.sort(rng.choice(len(found), min(int(share), len(found)), replace=False))
            tokens.append(torch.from_numpy(found[drawn]))
            classes.append(torch.from_numpy(filled[drawn]))
    return torch.cat(tokens).float(), torch.cat(classes)
