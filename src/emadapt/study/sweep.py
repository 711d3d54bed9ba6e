"""What a sweep searches and how: the section `sweep:` of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep chooses, and what it chooses from. It changes no trained unit: none of it enters a unit's key."""

    sampler: Literal["tpe", "gp"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    """`median` below about 40 trials, `hyperband` from about 100."""
    seed: int = 0
    """Of the sampler. Trials are trained with the study's first seed, as its units are."""
    rank: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """LoRA's rank, one of these."""
    alpha_ratio: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """LoRA's alpha divided by its rank, one of these."""
    dropout: tuple[float, float] = (0.0, 0.3)
    """LoRA's dropout, lowest and highest."""
    adapter_lr: tuple[float, float] = (5e-5, 5e-3)
    """Learning rate of what is trained in the backbone, lowest and highest (`full`: a tenth of these); logarithmic."""
    head_lr: tuple[float, float] = (1e-4, 1e-2)
    """Learning rate of the head, lowest and highest; logarithmic."""
    weight_decay: tuple[float, ...] = ()
    """Lowest and highest, above 0; logarithmic. Empty: 0.0001 to 0.1 for `frozen`, not searched for the others."""
    head: tuple[str, ...] = ()
    """Heads to choose from. Empty: not searched."""
    blocks: tuple[str | tuple[int, ...], ...] = ()
    """Choices for the backbone's `blocks`; each has its own token cache. Empty: not searched."""
    scale: tuple[float, ...] = ()
    """Choices for the backbone's `scale`; each has its own token cache. Empty: not searched."""

    def problems(self) -> list[str]:
        """Values out of range, a line each."""
        bad = []
        ranges = {"head_lr": self.head_lr, "adapter_lr": self.adapter_lr}
        if self.weight_decay:
            ranges["weight_decay"] = self.weight_decay  # type: ignore[assignment]
        for name, ends in ranges.items():
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                bad.append(
                    f"sweep.{name}: found {list(ends)}; expected [lowest, highest], both above 0"
                )
        if not 0 <= self.dropout[0] <= self.dropout[1] < 1:
            bad.append(
                f"sweep.dropout: found {list(self.dropout)}; expected [lowest, highest] in [0, 1)"
            )
        for name in ("rank", "alpha_ratio", "head", "blocks", "scale"):
            choices = getattr(self, name)
            if len(set(choices)) < len(choices):
                bad.append(f"sweep.{name}: a choice stands twice in {list(choices)}")
        if min(self.rank) < 1 or min((*self.alpha_ratio, *self.scale)) <= 0:
            bad.append("sweep: ranks must be at least 1, alpha_ratio and scale above 0")
        if odd := [b for b in self.blocks if isinstance(b, str) and b not in ("auto", "last")]:
            bad.append(
                f"sweep.blocks: found {odd[0]!r}; expected 'auto', 'last' or a list of block numbers"
            )
        if self.seed < 0:
            bad.append(f"sweep.seed: found {self.seed}; expected at least 0")
        return bad
