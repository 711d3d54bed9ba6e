"""Models from images and from what is cached of them, saved and loaded."""

import json
from pathlib import Path

import pytest
import torch

from emadapt.errors import InputError
from emadapt.models.heads import HEADS
from emadapt.models.segmenter import Partial, Segmenter
from emadapt.study.regimes import regime_settings
from emadapt.training.model_files import load_model, save_model
from tiny import regime_for

BACKBONE = {"arch": "tiny_dinov2", "source": "random", "blocks": (2, 4), "tile": 56}
KINDS = {
    "frozen": regime_settings(kind="frozen"),
    "lora": regime_settings(kind="lora", rank=3, alpha=6.0, dropout=0.1),
    "lora_last_k": regime_settings(kind="lora_last_k", rank=3, alpha=6.0, k=2),
    "bitfit": regime_settings(kind="bitfit"),
    "full": regime_settings(kind="full"),
}
SIZE = (42, 56)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(seed))


def trained(kind: str, head: str = "pyramid") -> Segmenter:
    """A segmenter whose every trained tensor, buffers included, is away from its initial value."""
    segmenter = regime_for(BACKBONE, KINDS[kind], head).build(seed=5).train()
    parameters = [p for group in segmenter.trainable().values() for p in group]
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    for seed in range(2):
        (segmenter(images(seed), SIZE) * torch.linspace(-1, 1, 56)).mean().backward()
        optimiser.step()
    return segmenter.eval()


def save(segmenter: Segmenter, folder: Path, kind: str, head: str = "pyramid") -> None:
    save_model(segmenter, regime_for(BACKBONE, KINDS[kind], head), folder, {"threshold": 0.5})


@torch.inference_mode()
def logits(segmenter: Segmenter) -> torch.Tensor:
    return segmenter(images(9), SIZE)


@pytest.mark.parametrize(
    ("kind", "head"),
    [*((kind, "pyramid") for kind in KINDS), *(("frozen", head) for head in HEADS)],
)
def test_what_is_saved_and_loaded_gives_the_same_logits(
    tmp_path: Path, kind: str, head: str
) -> None:
    before = trained(kind, head)
    save(before, tmp_path, kind, head)
    torch.manual_seed(12345)  # nothing of the loaded model is left to chance
    after, card = load_model(tmp_path)
    assert not after.training
    assert torch.equal(logits(after), logits(before))
    assert card["threshold"] == 0.5
    assert card["weights"] == before.backbone.provenance.to_dict()


def test_other_weights_than_those_it_was_trained_on_are_refused(tmp_path: Path) -> None:
    save(trained("lora", "linear"), tmp_path, "lora", "linear")
    card = json.loads((tmp_path / "model.json").read_text())
    card["weights"]["sha256"] = "0" * 64
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"found backbone weights .*; expected 000000000000"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_their_tokens_give_the_same_logits(kind: str) -> None:
    segmenter = trained(kind)
    with torch.inference_mode():
        tokens = segmenter.backbone(images(9))
        assert [tuple(t.shape) for t in tokens] == [(2, 64, 3, 4)] * 2
        assert torch.equal(segmenter(tokens, SIZE), logits(segmenter))
        assert torch.equal(segmenter(torch.cat(tokens, 1), SIZE), logits(segmenter))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_adapters_in_the_last_blocks_see_what_the_whole_backbone_would_give_them(k: int) -> None:
    """Logits and gradients from what is cached below the cut are those of a run from the image."""
    settings = regime_settings(kind="lora_last_k", rank=3, alpha=6.0, k=k)
    segmenter = regime_for(BACKBONE, settings, "pyramid").build(seed=5).train()
    with torch.no_grad():
        for p in segmenter.trainable()["adapter"]:
            p.add_(0.1 * torch.randn(p.shape))
    assert segmenter.cut == 4 - k
    below, entering = segmenter.backbone.entering(images(), 4 - k)
    stacked = torch.cat(below, 1) if below else torch.zeros(2, 0, 3, 4)
    parameters = [p for group in segmenter.trainable().values() for p in group]
    out = []
    for batch in (images(), Partial(stacked, entering)):
        found = segmenter(batch, SIZE)
        (found * torch.linspace(-1, 1, 56)).sum().backward()
        out.append([found.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)])
        assert len(out[-1]) == 1 + len(parameters)
        segmenter.zero_grad()
    for a, b in zip(*out, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_the_seed_alone_decides_the_initial_values() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(99 - seed)  # what ran before does not matter
        return regime_for(BACKBONE, KINDS["lora"], "pyramid").build(seed).trained_state()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    drawn = [k for k, v in first.items() if v.ndim > 1 and ".lora_B" not in k]
    assert not [k for k in drawn if torch.equal(first[k], other[k])]
    assert not any(v.any() for k, v in first.items() if ".lora_B" in k)
