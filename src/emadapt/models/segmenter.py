"""A segmenter is a backbone and a head: slices or cached tokens in, probabilities out.

It says what block of slices it wants to see (`depth`, `shown`) and gives their probabilities
(`slab`). Most models see one slice at a time; `BlockSegmenter` in resunet3d.py and
`PromptedSegmenter` in sam2.py see something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import Geometry, Grey, merge_tiles, to_input, with_neighbours
from emadapt.errors import InputError
from emadapt.models.adapters import State, adapter_state, load_adapter
from emadapt.models.device import Fitting, autocast
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import ONE_CLASS

BATCH_TILES = 16
"""Tiles that go through a model at once."""
IMAGE_CHANNELS = (1, 3)
"""Of images, one slice or with its neighbours; tokens have more."""

Probability = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Partial:
    """What the token cache has of tiles whose upper blocks are adapted.

    Attributes:
        tokens: (B, blocks * D, h, w) float16 of the blocks below the first adapted one, perhaps of
            none.
        entering: (B, N, D) float16, what enters the first adapted block.
    """

    tokens: torch.Tensor
    entering: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the tokens."""
        return self.tokens.shape

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Partial:
        return Partial(self.tokens[rows], self.entering[rows])

    def to(self, device: torch.device, non_blocking: bool = False) -> Partial:
        """The same on another device."""
        parts = (self.tokens, self.entering)
        return Partial(*(part.to(device, non_blocking=non_blocking) for part in parts))

    def pin_memory(self) -> Partial:
        """The same in memory from which a GPU copies while it works."""
        return Partial(self.tokens.pin_memory(), self.entering.pin_memory())

    @staticmethod
    def stack(items: Sequence[Partial]) -> Partial:
        """A batch of single tiles."""
        entering = torch.stack([item.entering for item in items])
        return Partial(torch.stack([item.tokens for item in items]), entering)


Inputs = torch.Tensor | Partial
"""Images (B, 1 or 3, H, W) in [0, 1], cached tokens (B, blocks * D, h, w), or a part of them."""


class Segmenter(nn.Module):
    """A model that sees one slice at a time.

    Args:
        spec: how slices enter it.
        backbone: `Backbone`, or something that hands images on; with its adapter, if it has one.
        head: tokens to logits.
        cut: number of blocks below the first adapted one, whose output the token cache keeps; None:
            the cache has all.
    """

    depth = 1
    """Slices that it sees together, and is sure of."""
    classes: tuple[str, ...] = ONE_CLASS
    """Names of what it segments; its logits are of the background and of each of them."""
    needs_labels = False
    """Whether its prompts are made of the labels that it is scored on."""
    score = "iou"
    """What it is validated by."""

    def __init__(
        self, spec: BackboneSettings, backbone: Any, head: nn.Module, cut: int | None = None
    ) -> None:
        super().__init__()
        self.spec, self.backbone, self.head, self.cut = spec, backbone, head, cut
        self.fitting = Fitting()

    @property
    def patch(self) -> int:
        """Sides of tiles are multiples of it."""
        return int(self.backbone.arch.patch)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((t.device for t in tensors), torch.device("cpu"))

    def read_weights(self) -> Segmenter:
        """Read the backbone's weights now, not when a token is first computed."""
        _ = getattr(self.backbone, "vit", None)
        return self

    def forward(self, batch: Inputs | list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Logits at `size`.

        Args:
            batch: images, or what is cached of them; or one (B, D, h, w) per block.
            size: (H, W) of the images and of the logits.

        Returns:
            (B, classes + 1, H, W) float32, of a model of blocks (B, classes + 1, Z, H, W).
        """
        return torch.as_tensor(self.head(self.tokens(batch), size))

    def tokens(self, batch: Inputs | list[torch.Tensor]) -> list[torch.Tensor]:
        """One (B, D, h, w) per block that the head sees."""
        if isinstance(batch, list):
            return batch
        if isinstance(batch, Partial):
            below, grid = batch.tokens, (batch.tokens.shape[2], batch.tokens.shape[3])
            return list(
                self.backbone.resume(self._split(below), batch.entering.float(), self.cut, grid)
            )
        if batch.shape[1] in IMAGE_CHANNELS:
            return list(self.backbone(batch))
        return self._split(batch)

    def _split(self, stacked: torch.Tensor) -> list[torch.Tensor]:
        """(B, blocks * D, h, w) float16 -> one (B, D, h, w) float32 per block."""
        return list(stacked.float().split(self.backbone.arch.dim, 1)) if stacked.shape[1] else []

    def no_tokens(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of no samples, which take part in a backward pass."""
        if self.backbone.arch_name == "none":
            return [inputs]
        patch = self.patch if inputs.shape[1] in IMAGE_CHANNELS else 1
        shape = (0, self.backbone.arch.dim, inputs.shape[2] // patch, inputs.shape[3] // patch)
        adapted = bool(self.trainable()["adapter"])
        return [
            torch.zeros(shape, device=inputs.device, requires_grad=adapted)
            for _ in self.backbone.blocks
        ]

    def shown(self, volume: Volume, z: int, geo: Geometry) -> Grey:
        """Slice `z` as the model sees it: (H, W) uint8, or between its neighbours (H, W, 3)."""
        return to_input(with_neighbours(volume, z, self.spec.context), geo)

    def slab(self, shown: Grey, geo: Geometry, overlap: float | None = None) -> Probability:
        """Probabilities of `depth` neighbouring slices.

        Args:
            shown: (depth, H, W) or (depth, H, W, 3), each slice as `shown` gives it.
            geo: of these slices.
            overlap: share of a tile that its neighbours cover too; None: that of the settings.

        Returns:
            (depth, H, W) float32 in [0, 1], of several classes (depth, classes, H, W).
        """
        corners, (height, width) = geo.corners(overlap), geo.tile

        def tiles() -> Iterator[Probability]:
            for start in range(0, len(corners), BATCH_TILES):
                some = corners[start : start + BATCH_TILES]
                cut = [as_input(shown[0, y : y + height, x : x + width]) for y, x in some]
                yield from self.foreground(torch.stack(cut), geo.tile)

        return merge_tiles(tiles(), corners, geo)[None]

    def tops(self, geo: Geometry) -> list[int]:
        """The first rows of tiles, from the top of a padded slice to its bottom."""
        return sorted({y for y, _ in geo.corners()})

    @torch.inference_mode()
    def foreground(self, batch: Inputs, size: tuple[int, int]) -> Probability:
        """Probabilities (B, H, W) of a batch, of several classes (B, classes, H, W)."""

        def run(part: Inputs) -> tuple[torch.Tensor]:
            with autocast(self.spec.precision):
                logits = self(part.to(self.device), size)
            return (logits.float().softmax(1)[:, 1:].squeeze(1).cpu(),)

        return np.asarray(self.fitting(run, batch)[0].numpy())

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters to train: `head` and `adapter`."""
        return {
            "head": list(self.head.parameters()),
            "adapter": [p for p in self.backbone.parameters() if p.requires_grad],
        }

    def n_trainable(self) -> int:
        """Number of trained parameters, head and adapter."""
        return sum(p.numel() for group in self.trainable().values() for p in group)

    def share(self) -> float:
        """Trained parameters of the backbone as a share of its pretrained ones."""
        trained = sum(p.numel() for p in self.trainable()["adapter"])
        if not trained:
            return 0.0
        named = self.backbone.network.named_parameters()
        return trained / sum(p.numel() for name, p in named if ".lora_" not in name)

    def live_state(self) -> State:
        """What training changes, by name: the head's and the adapter's tensors themselves."""
        state = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        if self.backbone.network is not None:
            adapter = adapter_state(self.backbone.network)
            state |= {f"adapter.{k}": v for k, v in adapter.items()}
        return {k: v.detach() for k, v in state.items()}

    def trained_state(self) -> State:
        """The same as copies for a file."""
        return {k: v.cpu().contiguous() for k, v in self.live_state().items()}

    def load_trained(self, state: State) -> None:
        """Put back what `trained_state` gave.

        Raises:
            InputError: the tensors are those of another head or adapter.
        """
        head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
        prefix = "adapter."
        adapter = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            self.head.load_state_dict(head)
        except RuntimeError as error:
            raise InputError(
                "head",
                found=" ".join(str(error).split())[:200],
                expected="the tensors of this head",
                do="Load it with the settings that it was trained with.",
            ) from error
        if adapter or self.backbone.network is not None:
            load_adapter(self.backbone.network or self.backbone, adapter)
