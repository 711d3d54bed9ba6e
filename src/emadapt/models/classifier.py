"""A classifier of whole images: the vectors of `backbones.Pooled` in, a class out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry_of, to_input
from emadapt.models.device import autocast
from emadapt.models.heads import TokenHead, Tokens
from emadapt.models.nearest import Bank
from emadapt.models.segmenter import Probability, Segmenter
from emadapt.models.tokens import TokenView

BATCH = 32
"""Images that go through a model at once."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of `Votes`, as DINO has them."""


class Probe(TokenHead):
    """A linear layer on the concatenated vectors of an image.

    Args:
        width: channels of all vectors together.
        n_classes: logits of an image.
    """

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, n_classes)

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """One (B, D, 1, 1) per vector -> (B, n_classes, 1, 1)."""
        found: torch.Tensor = self.classify(torch.cat(tokens, 1).flatten(1))
        return found[..., None, None]


class Votes(Bank):
    """The nearest training images by cosine vote with exp(cosine / temperature).

    As in DINO (Caron et al. 2021, arXiv 2104.14294). Arguments of `Probe`.
    """

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__(width)
        self.n_classes = n_classes

    def fill(self, vectors: torch.Tensor, classes: torch.Tensor) -> None:
        """Take the vectors (n, width) of training images and their classes (n,)."""
        device = self.bank.device
        self.bank = F.normalize(vectors.float(), dim=1).half().to(device)
        self.targets = classes.float().to(device)

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """Logarithms of shares of the votes; shapes of `Probe.logits`."""
        with torch.autocast(self.bank.device.type, enabled=False):  # it would shuffle near ties
            queries = F.normalize(torch.cat(tokens, 1).flatten(1).float(), dim=1)
            near = (queries @ self.bank.float().T).topk(min(NEIGHBOURS, len(self.bank)), 1)
            votes = (near.values / TEMPERATURE).softmax(1)
            chosen = F.one_hot(self.targets[near.indices].long(), self.n_classes)
            shares = (votes[..., None] * chosen).sum(1)
        return shares.clamp_min(1e-6).log()[..., None, None]


HEADS = {"probe": Probe, "votes": Votes}
"""By name. head(width, n_classes)(tokens, (1, 1)) gives (B, n_classes, 1, 1) float32 logits."""


class Classifier(Segmenter):
    """A model that sees a whole image and gives the probability of each class."""

    score = "auroc"

    @torch.inference_mode()
    def classify(
        self, volume: Volume, numbers: Sequence[int], view: TokenView | None = None
    ) -> Probability:
        """Probabilities (n, classes) of some images of a dataset, from cached vectors if given."""
        geo, found = geometry_of(volume, self.spec, self.patch), []
        for start in range(0, len(numbers), BATCH):
            some = numbers[start : start + BATCH]
            if view is None:
                batch = torch.stack([as_input(to_input(volume.image[n], geo)) for n in some])
            else:
                rows = [int(row) for n in some for row in view.rows_of_slice(n)]
                batch = torch.from_numpy(np.array(view.tokens[rows]))
            with autocast(self.spec.precision):
                logits = self(batch.to(self.device), (1, 1))
            found.append(logits.float().softmax(1).flatten(1).cpu().numpy())
        return np.concatenate(found)
