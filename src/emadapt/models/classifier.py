"""A classifier of whole images: the vectors of `backbones.Pooled` in, a class out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import Grey, geometry, to_input
from emadapt.models.backbones import Pooled, pretrained
from emadapt.models.device import autocast, device
from emadapt.models.heads import TokenHead, Tokens
from emadapt.models.nearest import Bank
from emadapt.models.segmenter import Probability, Segmenter
from emadapt.models.tokens import TokenView, compute_tokens
from emadapt.study.backbones import BackboneSettings

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
        if view is None:
            images = [volume.image[n] for n in numbers]  # memory-mapped
            return self.probabilities(batches(images, self.spec, self.patch))
        rows = [int(row) for n in numbers for row in view.rows_of_slice(n)]
        return self.probabilities(torch.from_numpy(np.array(view.tokens[rows])).split(BATCH))

    @torch.inference_mode()
    def probabilities(self, inputs: Iterable[torch.Tensor]) -> Probability:
        """Probabilities (n, classes) of batches of images, or of cached vectors."""
        found = []
        for batch in inputs:
            with autocast(self.spec.precision):
                logits = self(batch.to(self.device), (1, 1))
            found.append(logits.float().softmax(1).flatten(1).cpu().numpy())
        return np.concatenate(found)


@torch.inference_mode()
def embed(images: Sequence[Grey], spec: BackboneSettings) -> npt.NDArray[np.float32]:
    """Vectors (n, blocks * 2 * D) of squares, (side, side) or with three channels, uint8."""
    backbone = pretrained(spec, Pooled).to(device())
    shown = batches(images, spec, backbone.arch.patch)
    found = [torch.cat(compute_tokens(backbone, some, spec.precision), 1) for some in shown]
    return torch.cat(found).flatten(1).float().cpu().numpy()


def batches(images: Sequence[Grey], spec: BackboneSettings, patch: int) -> Iterator[torch.Tensor]:
    """Squares of one size as a backbone takes them: (at most BATCH, 1 or 3, h, w)."""
    geo = geometry((images[0].shape[0], images[0].shape[1]), spec, patch)
    for start in range(0, len(images), BATCH):
        some = images[start : start + BATCH]
        yield torch.stack([as_input(to_input(np.asarray(image), geo)) for image in some])
