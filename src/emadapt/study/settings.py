"""Settings of a study, each beside what it means: datasets, training sets, splits, backbones, regimes, training, diagnostics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class DatasetSettings:
    """One annotated EM volume."""

    layout: Literal["lucchi", "vnc", "folders", "stack"]
    voxel_nm: tuple[float, float, float]
    """Voxel size (z, y, x) in nm."""
    foreground: str | tuple[int, ...] = ">127"
    """Which label values are what is segmented: ">N" or a list of ids."""
    pairing: Literal["number", "stem", "lexicographic", "lexicographic_165"] = "number"
    """How an image finds its label. The last two replicate a known mistake and are tagged wherever they are used."""
    path: str = ""
    """Folder of the raw data; empty: data/<name>."""
    organelles: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What the label's ids are, e.g. `{mitochondria: [1], er: [2]}`."""
    organelle: str = ""
    """Which of `organelles` is what is segmented, in the place of `foreground`."""
    labelled: bool = True
    """False: images alone, to be `unlabelled` in training sets, a `reference`, or diagnosed; no model is scored on them."""

    @property
    def mispaired(self) -> bool:
        """Whether images have other slices' labels, as two sorted lists pair them."""
        return self.pairing.startswith("lexicographic")

    @property
    def rule(self) -> str | tuple[int, ...]:
        """Which label values are what is segmented, as `foreground` has it."""
        return self.organelles[self.organelle] if self.organelle else self.foreground

    def described(self) -> dict[str, Any]:
        """The settings; those of organelles and `labelled` only where they are in use, so that hashes from before them hold."""
        later = {"organelles": {}, "organelle": "", "labelled": True}
        used = {
            "organelles": {self.organelle: self.rule} if self.organelle else {}
        }  # other organelles' ids change nothing
        return {
            k: v
            for k, v in (dataclasses.asdict(self) | used).items()
            if k not in later or v != later[k]
        }


@dataclass(frozen=True)
class TrainSetSettings:
    """What a unit trains on: one dataset or a union of several, and how much of it is labelled."""

    datasets: tuple[str, ...]
    slices: int | str | dict[str, int | str] = 0
    """Labelled training slices of each dataset, spread in z, drawn by the unit's seed: a number, or a share (`25%`); 0: all. A
    map gives them for some datasets (`{vnc: 2}`); of the others all are labelled."""
    crops: int | str = 0
    """Labelled tiles of each dataset in the place of whole slices, likewise; of a regime in 3D, patches."""
    draw: Literal["", "balanced", "proportional"] = ""
    """How often a union draws each dataset: equally often, or by its size; empty: what `train.balanced` says."""
    unlabelled: tuple[str, ...] = ()
    """Datasets whose images take part in the penalty of `align: coral` and `adversarial`; other regimes leave them out."""

    @property
    def few(self) -> bool:
        """Whether only a part of the training slices counts as labelled."""
        return bool(self.slices or self.crops)

    def slices_of(self, dataset: str) -> int | str:
        """Labelled training slices of one of its datasets."""
        return self.slices.get(dataset, 0) if isinstance(self.slices, dict) else self.slices


@dataclass(frozen=True)
class SplitSettings:
    """How slices become train, val and test. Blocks of z with a gap, unless the reference is replicated."""

    kind: Literal["blocks", "random"] = "blocks"
    val: float = 0.15
    """Share of the training slices held out for early stopping and sweeps."""
    test: float = 0.2
    """Share of the slices held out for testing where the dataset has no official test volume."""
    gap_nm: float = 30.0
    """Thickness left unused between two blocks, at least one slice."""
    seed: int = 0
    """Seed of `random`."""


@dataclass(frozen=True)
class BackboneSettings:
    """A pretrained backbone and how slices enter it."""

    arch: str
    source: Literal["hub", "pypi", "file", "random"]
    file: str = ""
    blocks: str | tuple[int, ...] = "auto"
    """Blocks whose tokens the head sees, 1-based; `auto`: four, evenly spaced to the last; `last`: the last alone."""
    scale: float = 1.0
    """Up- or down-sampling of the slice before it is cut into tiles."""
    longest_edge: int = 0
    """Resize the slice so that its longer side has this many pixels (each side floored to the patch); 0: use `scale`."""
    tile: int = 252
    """Side of a square tile in input pixels, floored to the patch; 0: the whole slice at once."""
    overlap: float = 0.5
    """Share of a tile that its neighbour covers too when whole slices are predicted."""
    views: int = 1
    """Augmented views of the training slices in the token cache, besides the plain one."""
    stride: int = 0
    """Pixels between two patches, a divisor of the patch: less than it, patches overlap and tokens lie on a finer grid; 0: the
    patch."""
    smooth_z_nm: float = 0.0
    """Standard deviation of a Gaussian along z over the probabilities of neighbouring slices that are predicted; 0: none."""
    flips: bool = False
    """Predict each tile and its mirror images in y, in x and in both, and take the mean: four times the work of prediction."""
    context: Literal[0, 1] = 0
    """1: the slices below and above as the first and third of the three input channels (2.5D); 0: the slice as all three."""
    normalisation: Literal["checkpoint", "imagenet"] = "checkpoint"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the token cache and of prediction; `auto`: bf16 where the hardware has it, else fp32."""
    align: str = ""
    """How slices of different datasets are brought closer together, a name in `data.align.METHODS`; empty: not at all."""
    reference: str = ""
    """The dataset that `histogram`, `fda` and `voxel` make others resemble."""

    def described(self) -> dict[str, Any]:
        """The settings; those that came later only where they are in use, so that hashes from before them hold."""
        later = ("align", "reference", "smooth_z_nm", "flips", "context")
        return {k: v for k, v in dataclasses.asdict(self).items() if v or k not in later}


@dataclass(frozen=True)
class RegimeSettings:
    """How the backbone is adapted; an empty setting takes the value of `train`."""

    kind: Literal[
        "frozen",
        "lora",
        "lora_last_k",
        "dora",
        "bitfit",
        "full",
        "ridge",
        "knn",
        "unet2d",
        "resunet3d",
        "mitonet",
        "sam2",
    ]
    """`ridge`, `knn`: fitted to cached tokens at once, without gradients; `unet2d`, `resunet3d`: no backbone, a U-Net from
    scratch, on slices or on blocks of neighbouring slices; `mitonet`, `sam2`: no backbone, a system of another package."""
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """These three of the low-rank kinds: lora, lora_last_k and dora."""
    k: int = 0
    """lora_last_k: adapters in the last k of the blocks that run; what enters them is cached as frozen tokens are."""
    layer_decay: float = 0.75
    """full: factor on the learning rate from one block to the one below it, in (0, 1]."""
    patch: tuple[int, int, int] = (18, 160, 160)
    """resunet3d: voxels (z, y, x) of a patch; y = x, a multiple of 16."""
    channels: tuple[int, int, int, int, int] = (28, 36, 48, 64, 80)
    """resunet3d: of its five levels."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    head: str = ""
    epochs: int = 0
    head_lr: float = 0.0
    adapter_lr: float = 0.0
    weight_decay: float = -1.0
    weights: str = ""
    """mitonet: a file with its tensors; sam2: a folder as transformers saves it, or a repository of the Hugging Face hub."""
    factor: Literal[1, 2, 4] = 1
    """mitonet: by which slices are downsampled before it sees them."""
    finetune: bool = False
    """mitonet: train all of it from these weights, at `adapter_lr`; otherwise it is used as it is."""
    prompts: Literal["automatic", "box", "box+mask"] = "automatic"
    """sam2: a grid of points; or boxes, or boxes and masks, of the labelled objects of the slice that is scored: an oracle."""
    init: Literal["random", "ridge"] = "random"
    """Initial values of the head; `ridge`: those that ridge regression gives a `linear` head."""
    init_from: str = ""
    """Start from the adapter and head of another unit of the same backbone and seed: `REGIME-TRAIN_SET`, or `REGIME` for the same
    training set; or from those in a folder that `train` wrote, a path with a slash. A frozen unit's head starts any regime."""
    interpolate: float = -1.0
    """Do not train: take the weights this share of the way, in [0, 1], from the frozen unit that the unit of `init_from` itself
    started from to that unit (see `emadapt.training.interpolate`); below 0: train."""
    align: Literal["", "coral", "adversarial", "norm", "routed"] = ""
    """Bring the datasets of a training set together (see `emadapt.training.joint`): covariances of features alike, features that do not
    tell the dataset, normalisation layers of its own for each, or an adapter and a head of its own for each and a router."""
    align_weight: float = 0.1
    """Of the penalty of `coral`; of the reversed gradient of `adversarial`, at the end of its ramp."""

    @property
    def penalised(self) -> bool:
        """Whether a penalty compares datasets, for which no labels are needed."""
        return self.align in ("coral", "adversarial")

    @property
    def per_dataset(self) -> bool:
        """Whether a part of the model belongs to each dataset of a training set, so that one must be chosen to predict."""
        return self.align in ("norm", "routed")

    @property
    def interpolated(self) -> bool:
        """Whether its units lie between two others, and are not trained."""
        return self.interpolate >= 0

    @property
    def pretrained_tokens(self) -> bool:
        """Whether it works on the tokens of the backbone as pretrained, and so on the cache."""
        return self.kind in ("frozen", "ridge", "knn")

    @property
    def low_rank(self) -> bool:
        """Whether its adapters are low-rank factors."""
        return self.kind in ("lora", "lora_last_k", "dora")

    @property
    def from_scratch(self) -> bool:
        """Whether it is a U-Net from random values, without a backbone."""
        return self.kind in ("unet2d", "resunet3d")

    @property
    def outside(self) -> bool:
        """Whether it is a published system of another package."""
        return self.kind in ("mitonet", "sam2")

    @property
    def no_backbone(self) -> bool:
        """Whether it looks at no backbone of the study."""
        return self.from_scratch or self.outside

    @property
    def untrained(self) -> bool:
        """Whether a published system is used as it is."""
        return self.outside and not self.finetune

    @property
    def oracle(self) -> bool:
        """Whether its prompts are made of the labels that it is scored on."""
        return self.kind == "sam2" and self.prompts != "automatic"

    @property
    def is_3d(self) -> bool:
        """Whether it sees blocks of neighbouring slices, not slices."""
        return self.kind == "resunet3d"

    @property
    def own_head(self) -> str:
        """The head that belongs to the kind; empty where the study chooses."""
        return OWN_HEADS.get(self.kind, "")


OWN_HEADS = {
    "ridge": "linear",
    "knn": "knn",
    "unet2d": "unet2d",
    "resunet3d": "resunet3d",
    "mitonet": "mitonet",
    "sam2": "sam2",
}
HEAD_NAMES = ("linear", "deconv", "pyramid", "pyramid_bn", "unet")
"""Of `emadapt.models.heads.HEADS`, which imports torch."""
OWN_TRAINING: dict[str, dict[str, float]] = {"resunet3d": {"head_lr": 2e-3, "weight_decay": 0.0}}
"""Settings of `train` that a kind has of its own, unless the regime says otherwise: Adam at 0.002, as Xie et al. 2025."""


@dataclass(frozen=True)
class TrainSettings:
    """Fitting a head, and an adapter where the regime has one."""

    head: str = "pyramid"
    loss: Literal["dice_ce", "dice", "tversky"] = "dice_ce"
    head_lr: float = 1e-3
    adapter_lr: float = 5e-4
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 50
    epochs: int = 10
    steps_per_epoch: int = 100
    """Optimiser steps between two validations; 0: one pass over the training slices."""
    batch: int = 4
    """Samples a step; at least one per dataset of a union (the reference: 1 alone, 2 for the pair)."""
    patience: int = 0
    """Stop after this many epochs without a better monitored value; 0: run all epochs and keep the best."""
    monitor: Literal["val_iou", "val_loss"] = "val_iou"
    val_slices: int = 4
    """Validation slices per dataset that are scored each epoch, spread over the block; 0: all. In 3D neighbours, at least as
    many as a patch is deep."""
    augment: bool = True
    balanced: bool = True
    """Draw the datasets of a union equally often, whatever their size."""
    clip: float = 1.0
    average: float = 0.0
    """Validate and keep a running average of the trained weights, which keeps this share at each step, e.g. 0.99; 0: none."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of training; fp16, with a scaled loss, is for GPUs that are older than bf16 (compute capability below 8)."""
    cached: bool = True
    """Train `frozen` and `lora_last_k` from the token cache; false keeps the whole backbone in the loop (to check against)."""
    workers: int = 0
    """Processes that load and augment; the result does not depend on their number."""


@dataclass(frozen=True)
class DiagnoseSettings:
    """How far apart datasets are for a model; nothing here changes a trained unit."""

    slices: int = 24
    """Slices per dataset, evenly spaced over all of them; 0: all. The same ones for every model."""
    blocks: int = 8
    """Blocks of neighbouring slices: what the null shuffles and cross-validation holds out."""
    tokens: int = 4000
    """Tokens per dataset, evenly spread, for what moments cannot give: probes, neighbours, outliers, MMD, CKA."""
    permutations: int = 99
    """Of the p-values; the smallest is 1 / (permutations + 1), or 1 / 2^(blocks - 1) where that is larger."""
    replicates: int = 60
    """Of the bootstrap over blocks of slices."""
    controls: bool = True
    """Random weights, a dataset against its own halves, a dataset against itself at half the contrast."""
    against: str = ""
    """Measure only pairs with this dataset, e.g. one volume against many copies of it; empty: all pairs."""
    seed: int = 0
