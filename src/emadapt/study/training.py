"""Settings of training and of the diagnostics of domain mismatch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from emadapt.study.backbones import Precision
from emadapt.study.datasets import Sampling
from emadapt.study.strict import Settings, setting

Head = Literal["linear", "deconv", "pyramid", "pyramid_bn"]
"""Heads that a study can choose, keys of `models.heads.HEADS`."""


class TrainSettings(Settings):
    """Fitting a head, and an adapter where the regime has one."""

    head: Head = setting("pyramid", "Head on the tokens.")
    loss: Literal["dice_ce", "dice", "ce"] = setting(
        "dice_ce", "Loss over background and classes; of whole images always cross-entropy, `ce`."
    )
    head_lr: float = setting(1e-3, "Learning rate of the head.", gt=0)
    adapter_lr: float = setting(5e-4, "Learning rate in the backbone.", gt=0)
    weight_decay: float = setting(1e-2, "Weight decay of AdamW.", ge=0)
    schedule: Literal["cosine", "constant"] = setting("cosine", "Learning rate after warm-up.")
    warmup_steps: int = setting(50, "Steps of linear warm-up.", ge=0)
    epochs: int = setting(10, "Validations at most; an epoch is `steps_per_epoch` steps.", ge=1)
    steps_per_epoch: int = setting(
        100, "Steps between two validations; 0: one pass over the training slices.", ge=0
    )
    sampling: Sampling = setting(
        "balanced", "Draw the datasets of a training set equally often, or by their size."
    )
    batch: int = setting(4, "Samples in a step; at least one of each dataset.", ge=1)
    patience: int = setting(0, "Stop after this many epochs without a gain; 0: never.", ge=0)
    monitor: Literal["val_iou", "val_loss", "last"] = setting(
        "val_iou",
        "What chooses the epoch; `val_iou` is AUROC of whole images; `last`: nothing does, the "
        "last one is kept.",
    )
    val_slices: int = setting(
        4,
        "Validation slices of each dataset scored in each epoch; 0: all. All of whole images.",
        ge=0,
    )
    augment: bool = setting(True, "Flips, rotations and brightness.")
    clip: float = setting(1.0, "Largest norm of the gradient.", gt=0)
    ema: float = setting(
        0.0, "Validate and keep an exponential moving average with this decay; 0: none.", ge=0, lt=1
    )
    precision: Precision = setting("auto", "Arithmetic of training; fp16 for GPUs before Ampere.")
    cached: bool = setting(True, "Train frozen blocks from the token cache; false: online.")
    workers: int = setting(0, "Processes that load samples.", "nothing", ge=0)


TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "head": "deconv",
        "loss": "dice",
        "head_lr": 5e-5,
        "adapter_lr": 5e-5,
        "weight_decay": 1e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "epochs": 1000,
        "steps_per_epoch": 0,
        "batch": 1,
        "patience": 20,
        "monitor": "val_loss",
        "val_slices": 0,
        "augment": False,
        "sampling": "proportional",
        "precision": "fp32",
    }
}
"""The reference study's protocol (Fuster-Barceló & Uhlmann, arXiv 2602.08505)."""


class DiagnoseSettings(Settings):
    """How far apart datasets are for a model. Nothing here changes a trained unit."""

    slices: int = setting(24, "Slices of each dataset, evenly spaced; 0: all.", "scores", ge=0)
    blocks: int = setting(8, "Blocks of z, for the null and for cross-validation.", "scores", ge=4)
    tokens: int = setting(4000, "Tokens of each dataset for probes and neighbours.", "scores")
    permutations: int = setting(99, "Permutations of the null.", "scores", ge=1)
    replicates: int = setting(60, "Bootstrap replicates over blocks of z.", "scores", ge=1)
    controls: bool = setting(True, "Also measure random weights and raw pixels.", "scores")
    seed: int = setting(0, "Seed of the draws.", "scores", ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.slices and self.slices < self.blocks:
            raise ValueError("slices must be 0 (all) or at least as many as blocks")
        if self.tokens < 10 * self.blocks:
            raise ValueError("tokens must be at least ten for each block")
        return self
