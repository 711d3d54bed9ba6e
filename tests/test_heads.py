import pytest
import torch
from torch import nn

from emadapt.models.heads import HEADS, Deconv, Linear, Tokens

DIM = 16


def tokens(n_blocks: int, batch: int = 2, grid: tuple[int, int] = (3, 5), seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, DIM, *grid, generator=generator) for _ in range(n_blocks)]


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


def test_deconv_has_as_many_parameters_as_the_references() -> None:
    """1 x 1 to half the width, four doublings of 4 x 4 and 3 x 3, each normalised, and 1 x 1."""
    with torch.device("meta"):
        head = Deconv(1024, 1)
    assert sum(p.numel() for p in head.parameters()) == 4_156_546


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
