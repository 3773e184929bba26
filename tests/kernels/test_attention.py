"""Attention on packed tokens, as by torch's operators example by example."""

import pytest
import torch
from rounding import HALF, close

pytest.importorskip("triton")
from bert_tickets.kernels.attention import attend, draw, empty_words
from bert_tickets.kernels.branch import Branch


def attention_by_torch(q, k, v, lengths, heads, factors):
    """In float32, example by example; rows that belong to none are 0."""
    out, start = torch.zeros_like(q.float()), 0
    for number, length in enumerate(lengths):
        parts = [x[start : start + length].float().unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
        weights = torch.softmax(parts[0] @ parts[1].mT * parts[0].shape[2] ** -0.5, -1) * factors[number]
        out[start : start + length] = (weights @ parts[2]).transpose(0, 1).flatten(1)
        start += length
    return out


@HALF
@pytest.mark.parametrize(
    ("lengths", "padding", "size"), [([3, 17, 1, 9], 7, 16), ([100, 128, 60, 64, 65], 150, 16), ([40], 0, 64), ([200, 30], 3, 16)]
)
def test_attention_equals_torch(device, dtype, lengths, padding, size):
    """Without dropout, on views of the concatenated projections."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no product of bfloat16 matrices")
    tokens, heads = sum(lengths) + padding, 2
    qkv = torch.randn(tokens, 3 * heads * size, device=device).to(dtype).requires_grad_()
    ends = torch.tensor([0, *lengths, padding]).cumsum(0).int().to(device)
    bias = torch.zeros(3 * heads * size, device=device).to(dtype).requires_grad_()
    out = attend(qkv, bias, ends, max(lengths), heads, 0.0, None, Branch(device))
    expected = attention_by_torch(*qkv.chunk(3, 1), lengths, heads, [1.0] * len(lengths))
    close(out, expected, dtype)
    upstream = torch.randn_like(out)
    found, of_bias = torch.autograd.grad(out, [qkv, bias], upstream)
    (wanted,) = torch.autograd.grad(expected, qkv, upstream.float())
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(of_bias.float(), wanted.float().sum(0), rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert not out[sum(lengths) :].any()
    assert not found[sum(lengths) :].any()


def test_dropout_of_attention_is_the_same_in_the_backward_pass(device):
    """With values that are unit vectors the output shows the dropped weights, from which the whole follows."""
    lengths, heads, size = [16, 13, 70], 2, 128
    tokens = sum(lengths)
    ends = torch.tensor([0, *lengths, 0]).cumsum(0).int().to(device)
    q, k, upstream = (torch.randn(tokens, heads * size, device=device).half() / 4 for _ in range(3))
    unit = torch.cat([torch.eye(length, size, device=device) for length in lengths]).half().repeat(1, heads)
    words = empty_words(heads, tokens, 70, device)
    draw(words, 0.25, torch.tensor(5, device=device))
    bias = torch.zeros(3 * heads * size, device=device).half()

    def weights(p):
        kept = words if p else None
        out = attend(torch.cat([q, k, unit], 1), bias, ends, 70, heads, p, kept, Branch(device)).float()
        return [part.transpose(0, 1)[..., : len(part)] for part in out.unflatten(1, (heads, -1)).split(lengths)]

    factors = [(dropped > 0) / 0.75 for dropped in weights(0.25)]
    drawn = torch.cat([x.flatten() for x in factors]) > 0
    assert float(drawn.float().mean()) == pytest.approx(0.75, abs=5 * (0.1875 / len(drawn)) ** 0.5)
    corners = [
        factors[2][:, i : i + 6, j : j + 6] for i in (0, 64) for j in (0, 64)
    ]  # of both heads' tiles, and of other examples
    assert len({str(x.tolist()) for corner in (*corners, *(x[:, :6, :6] for x in factors[:2])) for x in corner}) == 12
    for dropped, whole, kept in zip(weights(0.25), weights(0.0), factors, strict=True):
        close(dropped, whole * kept, torch.float16)
    leaves = [x.clone().requires_grad_() for x in (q, k, torch.randn_like(q))]
    out = attend(torch.cat(leaves, 1), bias, ends, 70, heads, 0.25, words, Branch(device))
    expected = attention_by_torch(*leaves, lengths, heads, factors)
    close(out, expected, torch.float16)
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream.float()), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=4e-3)


@pytest.mark.parametrize("p", [0.1, 0.37])
def test_words_keep_each_weight_with_the_same_probability(device, p):
    """Each of 64 bits, independently of the bits beside it and of other words; other seeds draw others."""
    words = empty_words(2, 1000, 128, device)
    draw(words, p, torch.tensor(5, device=device))
    kept = (words[..., None] >> torch.arange(64, device=device) & 1).flatten(1).double()
    error = (p * (1 - p) / len(kept)) ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * error + 1e-12
    assert float(kept.mean()) == pytest.approx(1 - p, abs=5 * error / 128**0.5)
    pairs = (kept[:, 1:] * kept[:, :-1]).mean(), (kept[1:] * kept[:-1]).mean()
    assert torch.stack(pairs).cpu().tolist() == pytest.approx([(1 - p) ** 2] * 2, abs=10 * error / 128**0.5)
    draw(other := torch.empty_like(words), p, torch.tensor(6, device=device))
    assert not other.equal(words)
