"""The kernels compute what torch's operators do. Without a GPU Triton's interpreter runs them, on a CPU."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import only_fake
from steps import take
from torch.nn.utils import prune

from bert_tickets import kernels
from bert_tickets.bench.baselines import make_case
from bert_tickets.modeling.bert import encode

pytest.importorskip("triton")
from bert_tickets.kernels import embeddings, layers
from bert_tickets.kernels.adamw import BLOCK
from bert_tickets.kernels.attention import attend
from bert_tickets.training.masked_adamw import MaskedAdamW

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    torch.manual_seed(0)
    return torch.device(request.param)


def close(found, expected, dtype):
    """To rounding in `dtype`; the interpreter truncates bfloat16."""
    bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), rtol=bound, atol=bound)


def norm_inputs(dtype, device, tokens=37, width=48):
    x, bias, residual = torch.randn(tokens, width), torch.randn(width), torch.randn(tokens, width)
    norm = torch.nn.LayerNorm(width, eps=1e-12, device=device)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    leaves = [x.to(device, dtype), bias.to(device, dtype), residual.to(device)]
    return [leaf.requires_grad_() for leaf in leaves], norm


@HALF
@pytest.mark.parametrize("used", ["both", "out", "half"])
def test_add_norm_equals_torch(device, dtype, used):
    (x, bias, residual), norm = norm_inputs(dtype, device)
    leaves = [x, bias, residual, *norm.parameters()]
    upstream = {"out": torch.randn(x.shape, device=device), "half": torch.randn(x.shape, device=device).to(dtype)}
    if used != "both":
        upstream = {used: upstream[used]}
    out = dict(zip(("out", "half"), layers.add_norm(x, bias, residual, norm, 0.0, torch.tensor(0, device=device)), strict=True))
    expected = norm(x.float() + bias.float() + residual)
    close(out["out"], expected, torch.float32)
    close(out["half"], expected, dtype)
    found = torch.autograd.grad([out[name] for name in upstream], leaves, list(upstream.values()))
    wanted = torch.autograd.grad(expected, leaves, sum(grad.float() for grad in upstream.values()))
    for mine, theirs, leaf in zip(found, wanted, leaves, strict=True):
        assert mine.dtype == leaf.dtype
        close(mine, theirs, leaf.dtype)


@pytest.mark.parametrize("width", [48, 260])
def test_dropout_is_the_same_in_the_backward_pass_and_depends_on_the_seed(device, width):
    (x, bias, residual), norm = norm_inputs(torch.float16, device, 40, width)

    def factors(seed):
        out, _ = layers.add_norm(x, bias, residual, norm, 0.25, torch.tensor(seed, device=device))
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
    out, expected = layers.gelu(*leaves), F.gelu(x.float() + bias.float())
    close(out, expected, dtype)
    found, wanted = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad.float())
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, dtype)


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
def test_split_concatenates_gradients_and_sums_them(device, dtype):
    tokens, width = 70, 130
    qkv, bias = torch.randn(tokens, 3 * width, device=device).to(dtype), torch.zeros(3 * width, device=device).to(dtype)
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]
    upstream = torch.randn(tokens, 3 * width, device=device).to(dtype)
    out = layers.split(*leaves)
    assert torch.equal(torch.cat(out, 1), qkv)
    joined, of_bias = torch.autograd.grad(out, leaves, upstream.chunk(3, 1))
    assert torch.equal(joined, upstream)
    torch.testing.assert_close(of_bias.float(), upstream.float().sum(0), rtol=2e-2, atol=2e-2)


@HALF
@pytest.mark.parametrize(
    ("lengths", "padding", "size"), [([3, 17, 1, 9], 7, 16), ([100, 128, 60, 64, 65], 150, 16), ([40], 0, 64)]
)
def test_attention_equals_torch(device, dtype, lengths, padding, size):
    """Without dropout, on views of the concatenated projections."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no product of bfloat16 matrices")
    tokens, heads = sum(lengths) + padding, 2
    qkv = torch.randn(tokens, 3 * heads * size, device=device).to(dtype).requires_grad_()
    ends = torch.tensor([0, *lengths, padding]).cumsum(0).int().to(device)
    bias = torch.zeros(3 * heads * size, device=device).to(dtype).requires_grad_()
    out = attend(qkv, bias, ends, max(lengths), heads, 0.0, torch.tensor(0, device=device))
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
    seed, bias = torch.tensor(5, device=device), torch.zeros(3 * heads * size, device=device).half()

    def weights(p):
        out = attend(torch.cat([q, k, unit], 1), bias, ends, 70, heads, p, seed).float().unflatten(1, (heads, -1))
        return [part.transpose(0, 1)[..., : len(part)] for part in out.split(lengths)]

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
    out = attend(torch.cat(leaves, 1), bias, ends, 70, heads, 0.25, seed)
    expected = attention_by_torch(*leaves, lengths, heads, factors)
    close(out, expected, torch.float16)
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream.float()), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=4e-3)


def test_gradients_of_embeddings_equal_torchs(device):
    """Of more examples than a tile takes, with padding after the last one."""
    lengths, padding, width = [*range(1, 9)] * 5, 10, 130
    tokens = sum(lengths)
    words = torch.randn(tokens + padding, width, device=device).requires_grad_()
    tables = [torch.randn(rows, width, device=device).requires_grad_() for rows in (2, 12)]
    ids = torch.randint(2, (tokens + padding,), device=device)
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.full((padding,), 7)]).to(device)
    ends = torch.tensor([0, *lengths, padding]).cumsum(0).int().to(device)
    out = embeddings.add(words, *tables, ids, positions, ends, 8)
    expected = words + F.embedding(ids, tables[0]) + F.embedding(positions, tables[1])
    close(out, expected, torch.float32)
    upstream = torch.randn_like(out)
    upstream[tokens:] = 0
    found, wanted = (torch.autograd.grad(x, [words, *tables], upstream) for x in (out, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, torch.float32)


@HALF
def test_masked_adamw_equals_torchs_on_masked_gradients(device, dtype):
    """Some gradients are in half precision, one of them within another tensor."""
    shapes = [(3, BLOCK), (7,), (BLOCK,), (2, BLOCK + 1), (5, 5)]
    params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    kept = {i: (torch.rand(shapes[i]) < 0.5).to(device, torch.uint8) for i in (0, 3)}
    with torch.no_grad():
        for i, mask in kept.items():
            params[i].mul_(mask)
    copies = [p.detach().clone().requires_grad_() for p in params]

    def groups(params):
        return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]

    lr = torch.tensor(1e-2, device=device)
    ours = MaskedAdamW(groups(params), {params[i]: mask for i, mask in kept.items()}, dtype, lr, 1e-8)
    theirs = torch.optim.AdamW(groups(copies), lr=1e-2, eps=1e-8)
    for step in range(6):
        skip = step == 2
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            grad = torch.randn_like(p)
            if i in (0, 1, 3):
                p.grad_dtype = None
                p.grad = torch.cat([torch.zeros(3, device=device), 8 * grad.flatten()]).to(dtype)[3:].view(p.shape)
                grad = p.grad.float() / 8
            else:
                p.grad = 8 * grad
            q.grad = grad * kept[i] if i in kept else grad
        if step >= 4:  # a tensor that the loss does not depend on
            params[4].grad = copies[4].grad = None
        norm = torch.nn.utils.get_total_norm([q.grad for q in copies if q.grad is not None])
        torch.testing.assert_close(ours.norm() / 8, norm)
        ours.grad_scale, ours.found_inf = torch.tensor(8.0, device=device), torch.tensor(float(skip), device=device)
        ours.step()
        if not skip:
            theirs.step()
    for i, (p, q) in enumerate(zip(params, copies, strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert ours.state[p]["step"] == theirs.state[q]["step"] == (5 if i < 4 else 3)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], rtol=1e-5, atol=1e-6)
            if i in kept:
                assert not ours.state[p][name][kept[i] == 0].any()
        if i in kept:
            assert not p[kept[i] == 0].any()


def test_an_infinite_gradient_gives_an_infinite_norm(device):
    p = torch.ones(10, device=device).requires_grad_()
    optimizer = MaskedAdamW([{"params": [p]}], {}, torch.float16, torch.tensor(1e-2, device=device), 1e-8)
    for value in ("inf", "nan"):
        p.grad = torch.tensor([1.0] * 9 + [float(value)], device=device)
        assert not optimizer.norm().isfinite()


@only_fake
@pytest.mark.parametrize(("grad_accum", "steps"), [(1, 2), (2, 1)])
def test_steps_by_our_kernels_equal_those_by_torchs(one_gpu, calm_bert_dir, tmp_path, monkeypatch, grad_accum, steps):
    """To rounding, without dropout. Gradients of several parts of a batch are added in float32."""
    config = json.loads((calm_bert_dir / "config.json").read_text())
    shutil.copytree(calm_bert_dir, tmp_path / "bert")  # with heads that our attention takes
    (tmp_path / "bert/config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    with one_gpu():
        given = {"model": str(tmp_path / "bert"), "precision": "fp16", "batch_size": 2, "limit_train": 4}
        case = make_case("cola", given | {"grad_accum": grad_accum}, 0.5)
        expected = take(copy.copy(case), steps)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda device: True)
            found = take(case, steps)
        assert isinstance(found[0].optimizer, MaskedAdamW)
        torch.testing.assert_close(found[1].cpu(), expected[1].cpu(), rtol=0.01, atol=0.003)
        for name, before in case.net.named_parameters():
            kept = case.mask.get(name, torch.ones(()))
            before = before.detach().cpu() * kept
            ours, theirs = (step.params[name].detach().cpu() - before for step in (found[0], expected[0]))
            if not name.endswith("key.bias"):  # its gradient is 0 but for rounding
                assert (ours - theirs).abs().mean() <= 0.1 * theirs.abs().mean(), name
            assert not ours[kept.expand_as(ours) == 0].any()
            assert found[0].params[name].grad_dtype == (torch.float32 if grad_accum == 2 else None)


@only_fake
def test_weights_under_the_hooks_of_torchs_pruning_are_used(one_gpu, calm_bert_dir, monkeypatch):
    with one_gpu():
        given = {"model": str(calm_bert_dir), "precision": "fp16", "batch_size": 2, "limit_train": 2}
        case = make_case("cola", given, 0.5)
        for layer in case.net.bert.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                prune.random_unstructured(linear, "weight", 0.5)
        hidden = []
        for ours in (False, True):
            with monkeypatch.context() as patch, torch.no_grad(), torch.autocast("cuda", torch.float16):
                patch.setattr(kernels, "usable", lambda device, ours=ours: ours)
                hidden.append(encode(case.net, case.store.batch(torch.arange(2))).cpu())
    torch.testing.assert_close(*hidden, rtol=0, atol=0.02)


def test_kernels_that_do_not_compile_are_not_used(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "launch", fail)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(size))
    assert not kernels.usable.__wrapped__(torch.device("cuda", 0))
    assert "Failed to find C compiler" in capsys.readouterr().out
