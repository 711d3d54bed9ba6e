"""kNN: a token's score is the share of foreground among its nearest training tokens."""

from __future__ import annotations

import torch

from emadapt.models.heads import TokenHead

QUERIES = 1024  # tokens whose distances to the whole bank are in memory at once


class Bank(TokenHead):
    """A head without parameters, which remembers training tokens and their targets.

    Args:
        width: channels of a token, of all blocks.
    """

    bank: torch.Tensor
    targets: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, width, dtype=torch.float16))
        self.register_buffer("targets", torch.zeros(0))

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object
    ) -> None:
        """The bank has as many tokens as the file says."""
        for name in ("bank", "targets"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Nearest(Bank):
    """A bank of training tokens and the classes of their patches.

    Tokens are compared by Euclidean distance after standardising each channel with the bank's mean
    and deviation.

    Args:
        dim: D of a token.
        n_blocks: blocks that are concatenated.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    k: torch.Tensor
    threshold: torch.Tensor
    slope: torch.Tensor

    def __init__(self, dim: int, n_blocks: int) -> None:
        width = dim * n_blocks
        super().__init__(width)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("k", torch.tensor(1))
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("slope", torch.tensor(1.0))

    def fill(
        self, tokens: torch.Tensor, targets: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Take (N, D) training tokens, their targets (N,), and the (D,) standardisation."""
        device = self.bank.device
        self.shift, self.scale = shift.float().to(device), scale.float().to(device)
        self.bank = self._standardised(tokens.float().to(device)).half()
        self.targets = targets.float().to(device)

    def neighbours(self, tokens: torch.Tensor, k: int) -> torch.Tensor:
        """Targets of the k nearest of the bank, the nearest first: (n, D) -> (n, k)."""
        bank, k = self.bank.float(), min(k, len(self.bank))
        # |q - b|^2 / 2 = |q|^2 / 2 - q b + |b|^2 / 2, and the first is the same for all b.
        half = bank.square().sum(1) / 2
        found = []
        # Half precision would shuffle near ties.
        with torch.autocast(tokens.device.type, enabled=False):
            for some in tokens.float().split(QUERIES):
                closeness = self._standardised(some) @ bank.T - half
                found.append(self.targets[closeness.topk(k, 1).indices])
        return torch.cat(found)

    def shares(self, tokens: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
        """Mean target of the nearest for several k: (B, D, h, w) -> (len(ks), B, h, w)."""
        b, _, h, w = tokens.shape
        near = self.neighbours(tokens.movedim(1, -1).flatten(0, 2), max(ks))
        sums = near.cumsum(1)
        reached = [min(k, near.shape[1]) for k in ks]
        return torch.stack([sums[:, k - 1] / k for k in reached]).view(len(ks), b, h, w)

    def logits(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        share = self.shares(torch.cat(tokens, 1), (int(self.k),))[0]
        half = self.slope / 2 * (share - self.threshold)
        return torch.stack([-half, half], 1)  # B,2,h,w

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale
