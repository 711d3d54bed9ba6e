"""Settings of regimes: how a backbone is adapted. Each kind has its own fields only.

A class says here what the rest of the house needs to know of a regime without torch. How it is
built and fitted is in `training.regimes`, in a class of the same kind.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from emadapt.study.strict import Settings, setting
from emadapt.study.training import Head, TrainSettings

Channels = Annotated[int, Field(ge=1)]


STEPS = frozenset(TrainSettings.model_fields) - {"head", "sampling", "augment", "precision"}
"""Settings of `train` that are for training in steps."""


class RegimeSettings(Settings):
    """What every kind has. An optional field that is not given takes the value of `train`."""

    kind: str
    own_head: ClassVar[str] = ""
    """The head that belongs to the kind; empty: the study chooses one."""
    uses_backbone: ClassVar[bool] = True
    """Whether it looks at a backbone of the study."""
    on_pretrained_tokens: ClassVar[bool] = False
    """Whether its head sees the tokens of the backbone as pretrained."""
    several_classes: ClassVar[bool] = True
    """Whether one unit can segment several classes."""
    draws: ClassVar[bool] = True
    """Whether fitting it draws random numbers."""
    train_defaults: ClassVar[dict[str, Any]] = {}
    """Values of `train` that the kind replaces unless the regime says otherwise."""

    @property
    def sample(self) -> tuple[int, int, int] | None:
        """Voxels (z, y, x) of a training sample in 3D; None: tiles of single slices."""
        return None

    @property
    def depth(self) -> int:
        """Slices that a training sample spans."""
        return self.sample[0] if self.sample else 1

    @property
    def several_devices(self) -> bool:
        """Whether several processes can train one unit."""
        return False

    @property
    def trains(self) -> bool:
        """Whether labels change it; False: a pretrained system used as it is."""
        return True

    @property
    def sees_test_labels(self) -> bool:
        """Whether its prompts are made of the labels that it is scored on."""
        return False

    @property
    def unused(self) -> frozenset[str]:
        """Settings of `train` that mean nothing to it."""
        return STEPS

    @property
    def adapter(self) -> dict[str, Any]:
        """The settings that give an adapter's tensors their names and shapes."""
        return {}

    def problems_on(self, width: int, blocks: int) -> list[str]:
        """What does not fit a backbone, a line each, e.g. `rank: found 99; expected at most ...`.

        Args:
            width: channels of a token.
            blocks: number of blocks that run.
        """
        return []


class GradientRegime(RegimeSettings):
    """A regime that is trained in steps."""

    epochs: int | None = setting(None, "Instead of `train.epochs`.", ge=1)
    head_lr: float | None = setting(None, "Instead of `train.head_lr`.", gt=0)
    weight_decay: float | None = setting(None, "Instead of `train.weight_decay`.", ge=0)
    warm_start: str = setting(
        "",
        "Start from another unit's adapter and head: REGIME (same training set), "
        "REGIME-TRAIN_SET, or a model folder (a path with a slash).",
    )
    self_training: float = setting(
        0.0,
        "Weight of what is learned from `unlabelled` images, which a moving average of the model "
        "labels (a mean teacher with complementary masks); 0: they are not looked at.",
        ge=0,
    )

    @property
    def several_devices(self) -> bool:
        """Not with self-training, whose draws are not shared out."""
        return not self.self_training

    @property
    def unused(self) -> frozenset[str]:
        """The learning rate in a backbone, unless the kind changes one."""
        return frozenset({"adapter_lr"})


class HeadRegime(GradientRegime):
    """A regime whose head the study chooses."""

    head: Head | None = setting(None, "Instead of `train.head`.")


class AdaptingRegime(HeadRegime):
    """A regime that changes the backbone."""

    adapter_lr: float | None = setting(None, "Instead of `train.adapter_lr`.", gt=0)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time.", "nothing"
    )

    @property
    def unused(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def adapter(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": self.kind}


class FrozenSettings(HeadRegime):
    """A head on the tokens of the frozen backbone."""

    kind: Literal["frozen"]
    on_pretrained_tokens: ClassVar[bool] = True


class LowRankSettings(AdaptingRegime):
    """Low-rank adapters on the attention of every block (Hu et al. 2022, arXiv 2106.09685)."""

    rank: int = setting(16, "Rank of the factors.", ge=1)
    alpha: float = setting(32.0, "The adapter is scaled by alpha / rank.", gt=0)
    dropout: float = setting(0.0, "Dropout on the adapter's input.", ge=0, lt=1)

    @property
    def adapter(self) -> dict[str, Any]:
        """Kind, rank, alpha and, where there is one, k."""
        return self.model_dump(include={"kind", "rank", "alpha", "k"})

    def problems_on(self, width: int, blocks: int) -> list[str]:
        """A rank above the width, or adapters in more blocks than run."""
        problems = []
        if self.rank > width:
            problems.append(f"rank: found {self.rank}; expected at most {width}, the width")
        if (k := self.adapter.get("k", 0)) > blocks:
            problems.append(f"k: found {k}; expected at most {blocks}, the blocks that run,")
        return problems


class LoraSettings(LowRankSettings):
    """LoRA in every block."""

    kind: Literal["lora"]


class LoraLastKSettings(LowRankSettings):
    """LoRA in the last k blocks; the blocks below are cached."""

    kind: Literal["lora_last_k"]
    k: int = setting(..., "Blocks with adapters.", ge=1)


class BitFitSettings(AdaptingRegime):
    """Biases and LayerNorms (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    kind: Literal["bitfit"]


class FullSettings(AdaptingRegime):
    """The whole backbone."""

    kind: Literal["full"]


class RidgeSettings(RegimeSettings):
    """Ridge regression on cached tokens; the strength is chosen on validation slices."""

    kind: Literal["ridge"]
    draws: ClassVar[bool] = False
    own_head: ClassVar[str] = "linear"
    on_pretrained_tokens: ClassVar[bool] = True


class KnnSettings(RegimeSettings):
    """Nearest neighbours of cached tokens; k is chosen on validation slices."""

    kind: Literal["knn"]
    own_head: ClassVar[str] = "knn"
    on_pretrained_tokens: ClassVar[bool] = True


class UNet2dSettings(GradientRegime):
    """A U-Net from scratch on slices."""

    kind: Literal["unet2d"]
    own_head: ClassVar[str] = "unet2d"
    uses_backbone: ClassVar[bool] = False

    @property
    def adapter(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": self.kind}


class ResUNet3dSettings(GradientRegime):
    """A residual U-Net from scratch on blocks of slices, trained as in Xie et al. 2025."""

    kind: Literal["resunet3d"]
    own_head: ClassVar[str] = "resunet3d"
    uses_backbone: ClassVar[bool] = False
    train_defaults: ClassVar[dict[str, Any]] = {"head_lr": 2e-3, "weight_decay": 0.0}

    patch: tuple[int, int, int] = setting((18, 160, 160), "Voxels (z, y, x) of a sample.")
    channels: tuple[Channels, Channels, Channels, Channels, Channels] = setting(
        (28, 36, 48, 64, 80), "Channels of its five levels."
    )

    @field_validator("patch")
    @classmethod
    def _fits_the_levels(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        z, y, x = value
        if z < 1 or y != x or y % 16 or y < 32:
            raise ValueError("expected [z, y, x] with y = x, a multiple of 16 from 32 on")
        return value

    @property
    def sample(self) -> tuple[int, int, int]:
        """A patch."""
        return self.patch

    @property
    def adapter(self) -> dict[str, Any]:
        """Its patch and channels."""
        return self.model_dump(mode="json", include={"kind", "patch", "channels"})


class PretrainedSystemSettings(RegimeSettings):
    """A published system of another package."""

    uses_backbone: ClassVar[bool] = False

    several_classes: ClassVar[bool] = False

    weights: str


class MitoNetSettings(PretrainedSystemSettings):
    """MitoNet (Conrad & Narayan 2023), as it is or fine-tuned."""

    kind: Literal["mitonet"]
    own_head: ClassVar[str] = "mitonet"

    weights: str = setting(..., "File with its tensors (docs/how-to.md).", min_length=1)
    factor: Literal[1, 2, 4] = setting(1, "Downsampling before it sees a slice.")
    finetune: bool = setting(False, "Train all of it at `adapter_lr`; false: use it as it is.")
    epochs: int | None = setting(None, "Instead of `train.epochs`.", ge=1)
    adapter_lr: float | None = setting(None, "Instead of `train.adapter_lr`.", gt=0)
    weight_decay: float | None = setting(None, "Instead of `train.weight_decay`.", ge=0)

    @property
    def trains(self) -> bool:
        """Only when it is fine-tuned."""
        return self.finetune

    @property
    def unused(self) -> frozenset[str]:
        """The head's learning rate, for all of it has `adapter_lr`."""
        return frozenset({"head_lr"}) if self.finetune else STEPS


class Sam2Settings(PretrainedSystemSettings):
    """SAM 2 (Ravi et al. 2024), as it is."""

    kind: Literal["sam2"]
    own_head: ClassVar[str] = "sam2"

    weights: str = setting(
        ..., "Folder as transformers saves it, or a Hugging Face repository.", min_length=1
    )
    prompts: Literal["automatic", "box", "box+mask"] = setting(
        "automatic", "A grid of points, or the labelled objects themselves (an upper bound)."
    )

    @property
    def trains(self) -> bool:
        """Never."""
        return False

    @property
    def sees_test_labels(self) -> bool:
        """With boxes or masks, which are made of the labels."""
        return self.prompts != "automatic"


REGIME_SETTINGS: dict[str, type[RegimeSettings]] = {
    "frozen": FrozenSettings,
    "lora": LoraSettings,
    "lora_last_k": LoraLastKSettings,
    "bitfit": BitFitSettings,
    "full": FullSettings,
    "ridge": RidgeSettings,
    "knn": KnnSettings,
    "unet2d": UNet2dSettings,
    "resunet3d": ResUNet3dSettings,
    "mitonet": MitoNetSettings,
    "sam2": Sam2Settings,
}
"""Settings by kind. A new regime adds its own here, and its class in `training.regimes`."""


def regime_settings(**settings: Any) -> RegimeSettings:
    """The settings of a regime, by its `kind`.

    Raises:
        pydantic.ValidationError: a key is unknown, or a value is not allowed.
    """
    return REGIME_SETTINGS[settings["kind"]].model_validate_json(json.dumps(settings))
