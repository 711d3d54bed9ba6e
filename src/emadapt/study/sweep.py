"""Settings of a sweep: what is searched and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from emadapt.study.strict import Settings, setting
from emadapt.study.training import Head

Positive = Annotated[float, Field(gt=0)]
Rank = Annotated[int, Field(ge=1)]
Proportion = Annotated[float, Field(ge=0, lt=1)]


class SweepSettings(Settings):
    """How a sweep chooses, and what it chooses from. None of it changes a unit."""

    pruner: Literal["median", "hyperband", "none"] = setting(
        "median", "`median` below about 40 trials, `hyperband` from about 100.", "nothing"
    )
    seed: int = setting(0, "Seed of the sampler.", "nothing", ge=0)
    rank: tuple[Rank, ...] = setting(
        (2, 4, 8, 16, 32, 64), "Choices of LoRA's rank.", "nothing", min_length=1
    )
    alpha_ratio: tuple[Positive, ...] = setting(
        (0.5, 1.0, 2.0, 4.0),
        "Choices of LoRA's alpha divided by its rank.",
        "nothing",
        min_length=1,
    )
    dropout: tuple[Proportion, Proportion] = setting(
        (0.0, 0.3), "LoRA's dropout, lowest and highest.", "nothing"
    )
    adapter_lr: tuple[Positive, Positive] = setting(
        (5e-5, 5e-3), "Learning rate in the backbone, lowest and highest (log scale).", "nothing"
    )
    head_lr: tuple[Positive, Positive] = setting(
        (1e-4, 1e-2), "Learning rate of the head, lowest and highest (log scale).", "nothing"
    )
    weight_decay: tuple[Positive, Positive] | None = setting(
        None, "Lowest and highest (log scale); empty: 1e-4 to 0.1 for `frozen` alone.", "nothing"
    )
    head: tuple[Head, ...] = setting((), "Choices of the head; empty: not searched.", "nothing")

    @field_validator("dropout", "adapter_lr", "head_lr", "weight_decay")
    @classmethod
    def _rises(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and value[0] > value[1]:
            raise ValueError("expected [lowest, highest]")
        return value

    @field_validator("rank", "alpha_ratio", "head")
    @classmethod
    def _differ(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a choice is named twice")
        return value
