"""A segmenter is a backbone under a regime and a head: slices or cached tokens in, logits out. Saves only what was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from emadapt.data.crops import Cached
from emadapt.errors import InputError
from emadapt.models.archs import get_arch
from emadapt.models.backbones import Backbone, build_backbone
from emadapt.models.heads import HEADS, needs_image
from emadapt.models.mitonet import TILE, MitoNet
from emadapt.models.nearest import Nearest
from emadapt.models.outside import Outside, Passed
from emadapt.models.outside import own_spec as outside_spec
from emadapt.models.regimes import (
    State,
    adapter_state,
    apply_regime,
    cut_of,
    load_adapter,
    use_adapter,
)
from emadapt.models.resunet3d import ResUNet3d
from emadapt.models.sam2 import Sam2
from emadapt.models.unet2d import NoBackbone, UNet2d, own_spec
from emadapt.study.reading import build
from emadapt.study.study import BackboneSettings, RegimeSettings
from emadapt.training.domain_classifier import Copies, give_copies, use

WEIGHTS = Path("scratch/weights")
BASELINE_HEADS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "ridge": {"linear": HEADS["linear"]},
    "knn": {"knn": Nearest},
    "unet2d": {"unet2d": UNet2d},
    "resunet3d": {"resunet3d": ResUNet3d},
    "mitonet": {"mitonet": Passed},
    "sam2": {"sam2": Passed},
}
"""Regimes that have a head of their own (`RegimeSettings.own_head`)."""
OUTSIDE: dict[str, Callable[[RegimeSettings], Outside]] = {"mitonet": MitoNet, "sam2": Sam2}
IMAGE_CHANNELS = (1, 3)
"""Of images, one slice or with its neighbours; tokens have more."""


class Segmenter(nn.Module):
    """Backbone + head.

    Args:
        spec: backbone and input settings.
        regime: how the backbone is adapted.
        head: name in `HEADS`, or in `BASELINE_HEADS` of the regime.
        seed: of the head's and the adapter's initial values.
        backbone: with its weights; the regime changes it in place.
        datasets: that it is trained on: each gets normalisation layers (`align: norm`), or an adapter and a head (`routed`), of
            its own where the regime says so.

    Attributes:
        domains: these datasets with their token statistics, which training leaves (see `emadapt.models.closest`); empty for others.
        domain: the one whose part is in use.
        distances: those from each dataset that led to it; empty where the name did.
    """

    def __init__(
        self,
        spec: BackboneSettings,
        regime: RegimeSettings,
        head: str,
        seed: int,
        backbone: Backbone,
        datasets: Sequence[str] = (),
    ) -> None:
        super().__init__()
        heads = BASELINE_HEADS.get(regime.kind, HEADS)
        if head not in heads:
            raise InputError(
                f"head {head!r}",
                found="an unknown head",
                expected=", ".join(heads),
                do="Correct `head`.",
            )
        self.spec, self.regime, self.head_name = spec, regime, head
        self.backbone = backbone
        torch.manual_seed(seed)
        apply_regime(backbone, regime, datasets)
        own = {"channels": regime.channels} if regime.is_3d else {}
        self.head = heads[head](backbone.arch.dim, len(backbone.blocks), **own)
        self.cut = cut_of(backbone, regime)
        self.domains: dict[str, dict[str, list[float]]] = {}
        self.domain, self.distances = "", dict[str, float]()
        if regime.align == "norm":
            give_copies(self.head, datasets)
        if regime.align == "routed":
            self.head = Copies(self.head, datasets)
        if regime.per_dataset:
            self.domains = {name: {} for name in datasets}

    def forward(
        self, batch: torch.Tensor | list[torch.Tensor] | Cached, size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits at `size`.

        Args:
            batch: images (B, 1, H, W) in [0, 1], of a backbone with `context` (B, 3, H, W), of a regime in 3D (B, 1, Z, H, W);
                or what is cached of them: tokens
                (B, blocks * D, h, w) or one (B, D, h, w) per block, or, where these are not enough, `Cached`.
            size: (H, W) of the images and of the logits.

        Returns:
            (B, 2, H, W) or (B, 2, Z, H, W) float32.
        """
        tokens, image = self.tokens(batch)
        margin = (
            self.backbone.arch.patch - self.backbone.stride
        ) // 2  # overlapping patches: their middles span less
        inner = (
            size
            if not margin
            else (
                tokens[0].shape[2] * self.backbone.stride,
                tokens[0].shape[3] * self.backbone.stride,
            )
        )
        if needs_image(self.head_name):
            if image is None:
                raise ValueError(f"head {self.head_name} needs the image beside its tokens")
            image = image[:, image.shape[1] // 2, None]  # the slice itself, of three
            logits = self.head(
                tokens, inner, image[..., margin : margin + inner[0], margin : margin + inner[1]]
            )
        else:
            logits = self.head(tokens, inner)
        around = (margin, size[1] - inner[1] - margin, margin, size[0] - inner[0] - margin)
        return F.pad(logits, around, mode="replicate") if margin else torch.as_tensor(logits)

    def use(self, dataset: str, distances: dict[str, float] | None = None) -> None:
        """Take the part that belongs to a training dataset: normalisation layers (`align: norm`), adapter and head (`routed`)."""
        use(self.head, dataset)
        if self.regime.align == "routed":
            use_adapter(self.backbone, dataset)
        self.domain, self.distances = dataset, distances or {}

    def tokens(
        self, batch: torch.Tensor | list[torch.Tensor] | Cached
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """One (B, D, h, w) per block, and the image where it is at hand."""
        if isinstance(batch, list):
            return batch, None
        if isinstance(batch, Cached):
            stacked, entering, image = batch.tokens, batch.entering, batch.image
        elif batch.shape[1] in IMAGE_CHANNELS:
            return self.backbone(batch), batch
        else:
            stacked, entering, image = batch, None, None
        tokens = list(stacked.float().split(self.backbone.arch.dim, 1)) if stacked.shape[1] else []
        if entering is not None and self.cut is not None:
            grid = (stacked.shape[2], stacked.shape[3])
            tokens = self.backbone.resume(tokens, entering.float(), self.cut, grid)
        return tokens, image

    def no_tokens(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of no samples at all, (0, D, h, w) per block, for inputs (0, 1, H, W) or (0, blocks * D, h, w).

        They take part in a backward pass as others' do.
        """
        if isinstance(self.backbone, NoBackbone):
            return [inputs]
        patch = self.backbone.arch.patch if inputs.shape[1] in IMAGE_CHANNELS else 1
        shape = (0, self.backbone.arch.dim, inputs.shape[2] // patch, inputs.shape[3] // patch)
        adapted = bool(self.trainable()["adapter"])
        return [
            torch.zeros(shape, device=inputs.device, requires_grad=adapted)
            for _ in self.backbone.blocks
        ]

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
        """Trained parameters of the backbone, adapters included, as a share of those that it was pretrained with."""
        adapters = sum(v.numel() for k, v in self.backbone.vit.named_parameters() if ".lora_" in k)
        pretrained = sum(p.numel() for p in self.backbone.vit.parameters()) - adapters
        return sum(p.numel() for p in self.trainable()["adapter"]) / max(
            pretrained, 1
        )  # a U-Net from scratch has none

    def live_state(self) -> State:
        """What training changes: the head and the adapter, by name; the tensors themselves, where they are."""
        state = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        state |= {f"adapter.{k}": v for k, v in adapter_state(self.backbone).items()}
        return {k: v.detach() for k, v in state.items()}

    def trained_state(self) -> State:
        """The same as copies for a file."""
        return {k: v.cpu().contiguous() for k, v in self.live_state().items()}

    def load_trained(self, state: State) -> None:
        """Put back what `trained_state` gave."""
        head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
        try:
            self.head.load_state_dict(head)
        except RuntimeError as error:
            raise InputError(
                f"head {self.head_name!r}",
                found=" ".join(str(error).split())[:200],
                expected="the tensors of this head",
                do="Load it with the settings that it was trained with.",
            ) from error
        load_adapter(
            self.backbone,
            {k.removeprefix("adapter."): v for k, v in state.items() if k.startswith("adapter.")},
        )


def build_frozen(spec: BackboneSettings) -> Backbone:
    """The backbone as pretrained; weights come from the source that `spec` names."""
    blocks = (get_arch(spec.arch).depth,) if spec.blocks == "last" else spec.blocks
    return build_backbone(
        spec.arch,
        spec.source,
        blocks=blocks,
        file=spec.file or None,
        normalisation=spec.normalisation,
        stride=spec.stride,
        cache_dir=WEIGHTS,
    )


def build_segmenter(
    spec: BackboneSettings,
    regime: RegimeSettings,
    head: str,
    seed: int,
    datasets: Sequence[str] = (),
) -> Segmenter:
    """A fresh segmenter for training on `datasets`."""
    if regime.is_3d:
        own = own_spec(
            dataclasses.replace(spec, context=0), max(regime.patch[1:])
        )  # its patches hold the neighbours
        return Segmenter(own, regime, head, seed, NoBackbone(), datasets)
    if regime.from_scratch:
        return Segmenter(
            own_spec(spec), regime, head, seed, NoBackbone(3 if spec.context else 1), datasets
        )
    if regime.outside:
        return Segmenter(
            outside_spec(spec, regime, TILE),
            regime,
            head,
            seed,
            OUTSIDE[regime.kind](regime),
            datasets,
        )
    return Segmenter(spec, regime, head, seed, build_frozen(spec), datasets)


def save_segmenter(segmenter: Segmenter, folder: Path, facts: dict[str, Any]) -> None:
    """Write model.safetensors (head, adapter) and model.json (all that is needed to build it again, and `facts`)."""
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "backbone": dataclasses.asdict(segmenter.spec),
        "regime": dataclasses.asdict(segmenter.regime),
        "head": segmenter.head_name,
        "weights": segmenter.backbone.provenance.to_dict(),
        **({"domains": segmenter.domains} if segmenter.domains else {}),
        **facts,
    }
    save_file(segmenter.trained_state(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")


def _spec(kind: type, settings: Any) -> Any:
    """The settings of a card as `kind`; ValueError with what is wrong with them."""
    problems: list[str] = []
    spec = build(kind, settings, kind.__name__, problems)
    if spec is None or min(getattr(spec, "rank", 1), getattr(spec, "tile", 0) + 1) < 1:
        raise ValueError("; ".join(problems) or "a rank below 1 or a tile below 0")
    return spec


def load_segmenter(folder: Path) -> tuple[Segmenter, dict[str, Any]]:
    """Build the segmenter that `save_segmenter` wrote, in eval mode, and its model.json.

    Raises:
        InputError: the folder holds no model or a damaged one, or the backbone's weights are not the ones that it was
            trained on.
    """
    if not (folder / "model.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(
            folder,
            found="no model",
            expected="model.json and model.safetensors",
            do="Train the unit first: `dvc repro train@UNIT`.",
        )
    try:
        card = json.loads((folder / "model.json").read_text())
        spec, regime = (
            _spec(BackboneSettings, card["backbone"]),
            _spec(RegimeSettings, card["regime"]),
        )
        trained_on, head = str(card["weights"]["sha256"]), str(card["head"])
        state, domains = load_file(folder / "model.safetensors"), dict(card.get("domains", {}))
        segmenter = build_segmenter(spec, regime, head, 0, list(domains))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise InputError(
            folder,
            found=f"a damaged model, or one of another version ({type(error).__name__}: {str(error)[:300]})",
            expected="what `emadapt train` writes",
            do="Train the unit again.",
        ) from error
    segmenter.domains = domains
    found = segmenter.backbone.provenance.sha256
    if found != trained_on:
        raise InputError(
            folder,
            found=f"backbone weights {found[:12]}",
            expected=f"{trained_on[:12]}, which it was trained on",
            do="Restore those weights, or train again.",
        )
    segmenter.load_trained(state)
    return segmenter.eval(), card
