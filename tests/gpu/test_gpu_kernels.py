"""The forward and backward pass on a GPU, fake or real: the same as on a CPU, and as torch's kernels on padded tokens."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.modeling import attention
from bert_tickets.modeling.loading import load_bert
from bert_tickets.seeds import seeded
from bert_tickets.tasks import mlm
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm, mask_tokens
from bert_tickets.tasks.squad import Squad

TASKS = {"glue": Glue("mnli"), "squad": Squad(), "mlm": Mlm()}
LENGTHS = {"ragged": [3, 17, 9, 40, 33, 8], "even": [24] * 6}


def batch_of(kind, shape, net, device):
    """A batch of random tokens for a kind of task."""
    rng, lengths = np.random.default_rng(0), LENGTHS[shape]
    vocabulary = net.config.vocab_size
    ids = [rng.integers(5, vocabulary, n).tolist() for n in lengths]
    tokens = Tokens.of(ids, [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths])
    labels = rng.integers(0, 3, (6, 2) if kind == "squad" else 6)
    batch = TokenStore(tokens, labels, device).batch(torch.tensor([4, 0, 2, 5, 1, 3]))
    if kind == "mlm":
        batch = mask_tokens(replace(batch, labels=batch.input_ids[0]), [seeded(1, "masks")], 4, vocabulary, even=True)
    return batch


def computed(kind, shape, net, device):
    """Predictions, loss and gradients of a batch, on the CPU."""
    task, net = TASKS[kind], net.to(device)
    batch = batch_of(kind, shape, net, device)
    outputs = task.predict(net, batch).detach().cpu()
    if kind == "mlm":
        outputs = outputs[batch.labels.cpu() >= 0]  # places without a label only even out the shapes
    loss = task.loss(net, batch)
    loss.backward()
    return outputs, loss.detach().cpu(), {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", LENGTHS)
@pytest.mark.parametrize(("kind", "head"), [("glue", "classifier"), ("squad", "qa"), ("mlm", "mlm")])
def test_both_devices_compute_the_same_in_fp64(one_gpu, calm_bert_dir, kind, head, shape):
    net = load_bert(str(calm_bert_dir), head, "pretrained", 0, 3 if head == "classifier" else 2)[0].double().train()
    expected = computed(kind, shape, copy.deepcopy(net), torch.device("cpu"))
    with one_gpu():
        found = computed(kind, shape, net, torch.device("cuda", 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def ragged(batch):
    return attention.layout(batch, 2, 8, torch.float16)


def attended(layout, batch, device):
    """Attention of two heads of size 8 and its gradients in fp16, without a bucketed batch's padding."""
    tokens, generator = batch.input_ids.shape[1], torch.Generator().manual_seed(0)
    drawn = [torch.randn(tokens, 16, generator=generator) for _ in range(4)]
    drawn[3][tokens - batch.padding :] = 0
    *inputs, upstream = (x.to(device, torch.float16).requires_grad_() for x in drawn)
    out = layout.attend(*inputs, 0.0)
    (out.float() * upstream.detach().float()).sum().backward()
    found = [x.detach().float().cpu() for x in (out, *(x.grad for x in inputs))]
    assert not any(gradient[tokens - batch.padding :].any() for gradient in found[1:])
    return [x[: tokens - batch.padding] for x in found]


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("lengths", [[3, 17, 9, 40, 33, 8], [60] * 72 + [64], [10] + [3] * 8])
def test_attention_on_packed_tokens_equals_attention_on_padded_ones(one_gpu, lengths, bucketed):
    """In half precision. Bucketed batches of the last two have more padding than the longest example has tokens."""
    ids = [[5] * length for length in lengths]
    with one_gpu():
        device = torch.device("cuda", 0)
        store = TokenStore(Tokens.of(ids, ids), np.zeros(len(ids), int), device)
        batch = store.batch(torch.arange(len(ids)), bucketed=bucketed)
        found = attended(ragged(batch), batch, device)
        expected = attended(attention._padded(batch, 2, torch.float16), batch, device)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_dropout_of_packed_attention_is_the_same_in_the_backward_pass(one_gpu):
    """With examples of one token, out = v * factor, and the gradient of v is upstream * factor."""
    with one_gpu():
        device = torch.device("cuda", 0)
        store = TokenStore(Tokens.of([[5]] * 500, [[0]] * 500), np.zeros(500, int), device)
        grid = ragged(store.batch(torch.arange(500)))
        q, k = torch.randn(2, 500, 16).to(device, torch.float16).unbind(0)
        v = torch.ones(500, 16, device=device, dtype=torch.float16, requires_grad=True)
        out = grid.attend(q, k, v, 0.25)
        out.sum().backward()
        assert torch.equal(out.detach().cpu(), v.grad.cpu())
        assert 0.2 < float((out.cpu() == 0).float().mean()) < 0.3


@pytest.mark.parametrize(
    ("head_size", "dtype", "expected"),
    [
        (8, torch.float16, attention.Ragged),
        (64, torch.float32, attention.Padded),
        (26, torch.float16, attention.Padded),
        (264, torch.float16, attention.Padded),
    ],
)
def test_heads_that_flash_attention_does_not_take_are_padded(one_gpu, head_size, dtype, expected):
    with one_gpu():
        store = TokenStore(Tokens.of([[5] * 3], [[0] * 3]), np.zeros(1, int), torch.device("cuda", 0))
        assert type(attention.layout(store.batch(torch.arange(1)), 2, head_size, dtype)) is expected


@pytest.mark.parametrize("vocabulary", [104, 101])
def test_a_padded_vocabulary_changes_neither_loss_nor_gradients(one_gpu, vocabulary):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **calm))
    expected = computed("mlm", "ragged", copy.deepcopy(net), torch.device("cpu"))
    with one_gpu(), torch.autocast("cuda", torch.float16):
        found = computed("mlm", "ragged", net, torch.device("cuda", 0))
        assert mlm._scores(net, torch.zeros(3, 16, device="cuda")).shape == (3, 104)
    torch.testing.assert_close(found[1:], expected[1:], rtol=0.02, atol=2e-3)
