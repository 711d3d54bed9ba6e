"""kNN: a token's scores are the shares of classes among its nearest training tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from emadapt.models.heads import TokenHead, with_background

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
        n_logits: of the background and of each class.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    k: torch.Tensor
    threshold: torch.Tensor
    slope: torch.Tensor

    def __init__(self, dim: int, n_blocks: int, n_logits: int = 2) -> None:
        width = dim * n_blocks
        super().__init__(width)
        self.n_logits = n_logits
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("k", torch.tensor(1))
        self.register_buffer("threshold", torch.full((n_logits - 1,), 0.5).squeeze())
        self.register_buffer("slope", torch.ones(n_logits - 1).squeeze())

    def fill(
        self, tokens: torch.Tensor, classes: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Take (N, D) training tokens, their class ids (N,), and the (D,) standardisation."""
        device = self.bank.device
        self.shift, self.scale = shift.float().to(device), scale.float().to(device)
        self.bank = self._standardised(tokens.float().to(device)).half()
        self.targets = classes.float().to(device)

    def neighbours(self, tokens: torch.Tensor, k: int) -> torch.Tensor:
        """Class ids of the k nearest of the bank, the nearest first: (n, D) -> (n, k)."""
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
        """Share of each class in the nearest: (B, D, h, w) -> (len(ks), classes, B, h, w)."""
        b, _, h, w = tokens.shape
        near = self.neighbours(tokens.movedim(1, -1).flatten(0, 2), max(ks))
        votes = F.one_hot(near.long(), self.n_logits)[..., 1:].float().cumsum(1)  # n,k,classes
        reached = [min(k, near.shape[1]) for k in ks]
        return torch.stack([votes[:, k - 1].T / k for k in reached]).unflatten(-1, (b, h, w))

    def logits(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        shares = self.shares(torch.cat(tokens, 1), (int(self.k),))[0]
        slope, threshold = (own.view(-1, 1, 1, 1) for own in (self.slope, self.threshold))
        return with_background((slope * (shares - threshold)).movedim(0, 1), 1)  # B,n_logits,h,w

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale
