"""Between a fine-tuned model and the one that it was fine-tuned from, weight by weight, without training."""

from __future__ import annotations

import torch

from emadapt.models.regimes import State
from emadapt.models.segmenter import Segmenter

HEAD, ADAPTER = "head.", "adapter."


@torch.no_grad()
def interpolate(segmenter: Segmenter, tuned: State, probed: State, share: float) -> State:
    """Weights `share` of the way from linear probing to fine-tuning (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    Every weight W of the model is (1 - share) * W_probed + share * W_tuned. The backbone's part of it needs the adapter alone:
    of a low-rank product B A that is added, B is scaled.

    Args:
        segmenter: fresh, under the regime of the tuned one: its backbone as pretrained.
        tuned: `trained_state` of a unit whose training began with the head of `probed`.
        probed: that of a frozen unit.
        share: their alpha, in [0, 1].

    Returns:
        A state for `Segmenter.load_trained`. Running statistics of batch normalisation are interpolated as weights are.
    """
    start, regime, state = segmenter.trained_state(), segmenter.regime, {}
    for name, value in tuned.items():
        if not value.is_floating_point():  # how many batches a normalisation has seen
            state[name] = value
        elif name.startswith(HEAD):
            state[name] = torch.lerp(probed[name], value, share)
        elif not regime.low_rank:
            state[name] = torch.lerp(start[name], value, share)
        else:
            state[name] = value * share if ".lora_B." in name else value
    if regime.kind == "dora":
        for name in [name for name in tuned if "lora_magnitude_vector" in name]:
            _dora(segmenter, name.partition(".lora_magnitude_vector")[0], name, tuned, state, share)
    return state


def _dora(
    segmenter: Segmenter, layer: str, magnitude: str, tuned: State, state: State, share: float
) -> None:
    """Write factors and magnitude of a layer into `state`.

    DoRA's weight is D (W + s B A) with D = m / |W + s B A| for each row. So the mean with W is K (W + s K^-1 share D B A) with
    K = 1 - share + share D: again a direction and a magnitude.
    """
    base = (
        segmenter.backbone.vit.get_submodule(layer.removeprefix(ADAPTER))
        .get_base_layer()
        .weight.detach()
        .cpu()
    )
    a, b = (tuned[f"{layer}.lora_{factor}.weight"] for factor in "AB")
    scaling = segmenter.regime.alpha / segmenter.regime.rank
    rows = tuned[magnitude] / (base + scaling * b @ a).norm(dim=1)
    mean = 1 - share + share * rows
    state[f"{layer}.lora_B.weight"] = (share * rows / mean)[:, None] * b
    state[magnitude] = mean * (base + scaling * state[f"{layer}.lora_B.weight"] @ a).norm(dim=1)
