"""What a layer computes between its matrix products, as torch does."""

import pytest
import torch
import torch.nn.functional as F
from rounding import HALF, close

pytest.importorskip("triton")
from bert_tickets.kernels import layers
from bert_tickets.kernels.branch import Branch


def norm_inputs(dtype, device, tokens=13, width=48):
    x, bias, residual = torch.randn(tokens, width), torch.randn(width), torch.randn(tokens, width)
    norm = torch.nn.LayerNorm(width, eps=1e-12, device=device)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    leaves = [x.to(device, dtype), bias.to(device, dtype), residual.to(device)]
    return [leaf.requires_grad_() for leaf in leaves], norm


def add_norm(x, bias, residual, norm, p, seed):
    seed = torch.tensor(seed, device=x.device)
    return layers.add_norm(x, bias, residual, (norm.weight, norm.bias), p, norm.eps, seed, Branch(x.device))


@HALF
@pytest.mark.parametrize("used", ["both", "out", "half"])
def test_add_norm_equals_torch(device, dtype, used):
    (x, bias, residual), norm = norm_inputs(dtype, device)
    leaves = [x, bias, residual, *norm.parameters()]
    upstream = {"out": torch.randn(x.shape, device=device), "half": torch.randn(x.shape, device=device).to(dtype)}
    if used != "both":
        upstream = {used: upstream[used]}
    out = dict(zip(("out", "half"), add_norm(x, bias, residual, norm, 0.0, 0), strict=True))
    expected = norm(x.float() + bias.float() + residual)
    close(out["out"], expected, torch.float32)
    close(out["half"], expected, dtype)
    found = torch.autograd.grad([out[name] for name in upstream], leaves, list(upstream.values()))
    wanted = torch.autograd.grad(expected, leaves, sum(grad.float() for grad in upstream.values()))
    for mine, theirs, leaf in zip(found, wanted, leaves, strict=True):
        assert mine.dtype == leaf.dtype
        close(mine, theirs, leaf.dtype)


@pytest.mark.parametrize(("tokens", "width"), [(20, 48), (40, 260)])
def test_dropout_is_the_same_in_the_backward_pass_and_depends_on_the_seed(device, tokens, width):
    (x, bias, residual), norm = norm_inputs(torch.float16, device, tokens, width)

    def factors(seed):
        out, _ = add_norm(x, bias, residual, norm, 0.25, seed)
        of_x, of_residual, of_bias = torch.autograd.grad(out, [x, residual, bias], torch.randn_like(out))
        torch.testing.assert_close(of_bias.float(), of_x.float().sum(0), rtol=0.01, atol=0.02)
        drawn = (of_x != 0) / 0.75
        close(of_x, of_residual * drawn, torch.float16)
        close(out, norm((x.float() + bias.float()) * drawn + residual), torch.float32)
        return drawn

    one, other = factors(3), factors(4)
    assert torch.equal(one, factors(3))
    for drawn in (one, other):
        kept = drawn > 0
        assert float(kept.float().mean()) == pytest.approx(0.75, abs=5 * (0.1875 / x.numel()) ** 0.5)
        for axis in (0, 1):  # no row and no column is all kept or all dropped, nor equal to its neighbour
            assert 0 < kept.float().mean(axis).min() <= kept.float().mean(axis).max() < 1
    assert float((one == other).float().mean()) == pytest.approx(0.625, abs=0.06)
    assert not (one[:-1] == one[1:]).all(1).any()


@HALF
@pytest.mark.parametrize(("tokens", "width"), [(37, 48), (70, 130)])
def test_gelu_equals_torch(device, dtype, tokens, width):
    x, bias, grad = (torch.randn(*shape, device=device).to(dtype) for shape in ((tokens, width), (width,), (tokens, width)))
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    out, expected = layers.gelu(*leaves, Branch(device)), F.gelu(x.float() + bias.float())
    close(out, expected, dtype)
    found, wanted = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad.float())
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, dtype)


@HALF
def test_cast_copies_tensors_of_all_sizes(device, dtype):
    """Of less and of more than a block, into slices of one tensor."""
    tensors = [torch.randn(*shape, device=device) for shape in ((3, 5), (1,), (70, 130), (layers.CAST,))]
    joined = torch.zeros(sum(x.numel() for x in tensors), device=device).to(dtype)
    layers.cast(
        [part.view(x.shape) for part, x in zip(joined.split([x.numel() for x in tensors]), tensors, strict=True)], tensors
    )
    close(joined, torch.cat([x.flatten() for x in tensors]), dtype)
