import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emadapt.models.heads import HEADS, Deconv, Linear, Pyramid, Tokens
from emadapt.study.training import Head

DIM = 16


def tokens(n_blocks: int, batch: int = 2, grid: tuple[int, int] = (3, 5), seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, DIM, *grid, generator=generator) for _ in range(n_blocks)]


def test_names_are_those_that_settings_are_checked_against() -> None:
    assert set(HEADS) == set(typing.get_args(Head))


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("name", HEADS)
def test_two_float32_logits_per_pixel_of_any_size(name: str, n_blocks: int) -> None:
    head = HEADS[name](DIM, n_blocks, 2)
    for size in ((42, 70), (41, 67), (1, 2)):
        assert head(tokens(n_blocks), size).shape == (2, 2, *size)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(tokens(n_blocks), (8, 8)).dtype == torch.float32


@pytest.mark.parametrize("n_blocks", [1, 4])
@pytest.mark.parametrize("name", HEADS)
def test_a_gradient_reaches_every_parameter_and_every_block(name: str, n_blocks: int) -> None:
    torch.manual_seed(0)
    head, inputs = HEADS[name](DIM, n_blocks, 2), [t.requires_grad_() for t in tokens(n_blocks)]
    logits = head(inputs, (21, 33))
    (logits * torch.randn_like(logits)).sum().backward()
    still = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in inputs)


def test_deconv_is_the_references_layer_by_layer() -> None:
    with torch.device("meta"):
        leaves = [m for m in Deconv(1024, 1).modules() if not list(m.children())]
    found: list[tuple[object, ...]] = []
    for leaf in leaves:
        if isinstance(leaf, nn.ConvTranspose2d | nn.Conv2d):
            assert {len(set(v)) for v in (leaf.kernel_size, leaf.stride, leaf.padding)} == {1}
            geometry = (leaf.kernel_size[0], leaf.stride[0], int(leaf.padding[0]))
            kind, has_bias = type(leaf).__name__, leaf.bias is not None
            found.append((kind, leaf.in_channels, leaf.out_channels, *geometry, has_bias))
        else:
            norm = isinstance(leaf, nn.BatchNorm2d)  # ours, for several processes, is one of these
            found.append(("BatchNorm2d", leaf.num_features) if norm else (type(leaf).__name__,))
    expected: list[tuple[object, ...]] = [
        ("Conv2d", 1024, 512, 1, 1, 0, False),
        ("BatchNorm2d", 512),
        ("GELU",),
    ]
    for a, b in ((512, 256), (256, 128), (128, 64), (64, 64)):
        expected += [("ConvTranspose2d", a, b, 4, 2, 1, False), ("BatchNorm2d", b), ("GELU",)]
        expected += [("Conv2d", b, b, 3, 1, 1, False), ("BatchNorm2d", b), ("GELU",)]
    assert found == [*expected, ("Conv2d", 64, 2, 1, 1, 0, True)]


def test_pyramid_sees_each_sample_alone_and_has_no_batch_norm() -> None:
    torch.manual_seed(0)
    pyramid, deconv = Pyramid(DIM, 2).train(), Deconv(DIM, 2).train()
    assert not [m for m in pyramid.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    here, there = tokens(2), tokens(2, seed=1)
    # The same first sample.
    other = [torch.stack([h[0], 5 * t[1] + 3]) for h, t in zip(here, there, strict=True)]
    torch.testing.assert_close(
        pyramid(here, (24, 40))[0], pyramid(other, (24, 40))[0], rtol=0, atol=1e-6
    )
    # What BatchNorm would do.
    assert (deconv(here, (24, 40))[0] - deconv(other, (24, 40))[0]).abs().max() > 0.01


def test_pyramid_classifies_four_cells_a_token_and_side() -> None:
    """A quarter of the tokens' spacing, 3.5 pixels for a patch of 14, and nothing but bilinear
    resizing after that."""
    torch.manual_seed(0)
    head, inputs = Pyramid(DIM, 2), tokens(2)
    own, large = head(inputs, (12, 20)), head(inputs, (48, 80))  # 3 x 5 tokens
    torch.testing.assert_close(
        large, F.interpolate(own, (48, 80), mode="bilinear", align_corners=False)
    )
    coarse = F.interpolate(head(inputs, (6, 10)), (12, 20), mode="bilinear", align_corners=False)
    # The finer grid holds more than a coarser one would.
    assert (own - coarse).abs().max() > 0.1 * own.std()


def test_linear_is_a_matrix_product_of_standardised_tokens() -> None:
    torch.manual_seed(0)
    head, inputs = Linear(DIM, 2), tokens(2)
    with torch.no_grad():
        assert isinstance(head.norm.running_mean, torch.Tensor)
        assert isinstance(head.norm.running_var, torch.Tensor)
        head.norm.running_mean.normal_()
        head.norm.running_var.uniform_(0.5, 2.0)
        ours = head.eval()(inputs, (3, 5))  # at the tokens' own resolution
    x = torch.cat(inputs, 1).double().permute(0, 2, 3, 1)  # B,h,w,2D
    x = (x - head.norm.running_mean) / (head.norm.running_var.double() + head.norm.eps).sqrt()
    assert head.classify.bias is not None
    logits = x @ head.classify.weight[:, :, 0, 0].double().T + head.classify.bias.double()
    torch.testing.assert_close(ours.double(), logits.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_pyramid_bn_starts_as_pyramid_and_keeps_statistics_of_what_it_was_shown() -> None:
    """The same initial weights; another image of the batch changes what it gives in training, not
    in evaluation."""
    heads = {}
    for name in ("pyramid", "pyramid_bn"):
        torch.manual_seed(0)
        heads[name] = HEADS[name](DIM, 2, 2)
    plain, batch = (dict(head.named_parameters()) for head in heads.values())
    assert all(torch.equal(plain[name], value) for name, value in batch.items() if value.ndim > 1)
    assert not any(isinstance(m, nn.GroupNorm) for m in heads["pyramid_bn"].modules())
    one, two = tokens(2, batch=2), [torch.cat([t[:1], 5 * t[1:]]) for t in tokens(2, batch=2)]
    for name, mixes in (("pyramid", False), ("pyramid_bn", True)):
        first, second = (heads[name].train()(t, (8, 8))[0] for t in (one, two))
        assert torch.allclose(first, second, atol=1e-5) != mixes
        first, second = (heads[name].eval()(t, (8, 8))[0] for t in (one, two))
        assert torch.allclose(first, second, atol=1e-5)
