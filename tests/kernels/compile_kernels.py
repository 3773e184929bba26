"""Compile the kernels for an H100, without one: prints the name of each that compiled.

Triton's interpreter, which the other tests use on a CPU, takes code that its compiler does not.
"""

import os
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bert_tickets import kernels
from bert_tickets.kernels import adamw, attention, embeddings, layers, loss
from bert_tickets.kernels.branch import Branch


def compile_only(kernel, programs, *arguments, **constants):
    """Stand in for `kernels.launch`; results are not computed."""
    kernel.warmup(*arguments, grid=(programs,), **constants)
    print(kernel.fn.__name__, flush=True)


def gradients(*outputs: Tensor) -> None:
    """Run the backward pass to every leaf."""
    torch.autograd.backward(list(outputs), [torch.ones_like(out) for out in outputs])


def half(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float16, requires_grad=True)


def single(*shape: int) -> Tensor:
    return torch.zeros(*shape, requires_grad=True)


def compile_layers(branch: Branch, seed: Tensor) -> None:
    tokens = 8 * layers.PROGRAMS + 1  # with loads ahead
    for p in (0.1, 0.0):
        gradients(*layers.add_norm(half(9, 768), half(768), single(9, 768), (single(768), single(768)), p, 1e-12, seed, branch))
    norm = single(64), single(64)
    gradients(layers.add_norm(half(tokens, 64), half(64), single(tokens, 64), norm, 0.1, 1e-12, seed, branch)[1])
    for width in (3072, 1843):
        gradients(layers.gelu(half(9, width), half(width), branch))
    layers.cast([half(9, 9).detach(), half(9).detach()], [single(9, 9), single(9)])


def compile_attention(branch: Branch, seed: Tensor) -> None:
    for longest, p in ((12, 0.0), (100, 0.1)):
        ends = torch.tensor([0, longest, longest + 5]).int()
        words = attention.empty_words(2, longest + 5, longest, seed.device)
        attention.draw(words, 0.1, seed)
        qkv = half(longest + 5, 3 * 128)
        gradients(attention.attend(qkv, half(3 * 128), ends, longest, 2, p, words if p else None, branch))


def compile_embeddings(branch: Branch, seed: Tensor) -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    tables = BertEmbeddings(BertConfig(vocab_size=50, hidden_size=64))
    ids, ends = tuple(torch.zeros(9, dtype=torch.int64) for _ in range(3)), torch.tensor([0, 5, 9]).int()
    for few in (0, embeddings.FEW):
        with mock.patch.object(embeddings, "FEW", few):
            gradients(*embeddings.embed(tables, ids, ends, 5, seed, torch.float16, branch))
    gradients(loss.cross_entropy(half(3, 5000), torch.zeros(3, dtype=torch.int64)))


def compile_adamw() -> None:
    from bert_tickets.training.masked_adamw import MaskedAdamW

    p, q = single(2000), single(30)
    p.grad_dtype = None
    p.grad, q.grad = torch.zeros(2000, dtype=torch.float16), torch.zeros(30)
    with mock.patch("torch.optim.AdamW.__init__", lambda self, groups, lr, eps, fused: torch.optim.Optimizer.__init__(
        self, groups, {"lr": lr, "eps": eps, "betas": (0.9, 0.999), "weight_decay": 0.0})):  # fmt: skip
        optimizer = MaskedAdamW(
            [{"params": [p, q]}], {p: torch.ones(2000, dtype=torch.uint8)}, torch.float16, torch.ones(()), 1e-8
        )
    optimizer.clip(1.0, torch.ones(()))
    optimizer.step()
    adamw.clip(optimizer._places, optimizer._tables, torch.bfloat16, 1.0, None)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    stand_in = mock.Mock()
    stand_in.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    stand_in.get_current_device.return_value = stand_in.get_current_stream.return_value = 0
    driver.set_active(stand_in)
    with mock.patch.object(kernels, "launch", compile_only):
        branch, seed = Branch(torch.device("cpu")), torch.tensor(5)
        compile_layers(branch, seed)
        compile_attention(branch, seed)
        compile_embeddings(branch, seed)
        compile_adamw()
