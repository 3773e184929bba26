"""BERT's embeddings and their gradients, as by Hugging Face's module."""

import pytest
import torch
from rounding import close
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings

pytest.importorskip("triton")
from bert_tickets.kernels import embeddings
from bert_tickets.kernels.branch import Branch


@pytest.mark.parametrize(("few", "p"), [(0, 0.25), (embeddings.FEW, 0.0)])
def test_embeddings_equal_torchs(device, monkeypatch, few, p):
    """Of more examples and repetitions than a tile takes, with padding after the last one; with dropout, as it was drawn."""
    monkeypatch.setattr(embeddings, "FEW", few)
    monkeypatch.setattr(embeddings, "TOKENS", 16)
    lengths, padding, width = [*[1] * 30, 8, 3, 2], 3, 130
    tokens = sum(lengths) + padding
    config = {"vocab_size": 300, "hidden_size": width, "max_position_embeddings": 12, "num_attention_heads": 1}
    tables = BertEmbeddings(BertConfig(**config)).to(device)
    for table in tables.parameters():
        torch.nn.init.normal_(table)
    words = torch.randint(300, (tokens,), device=device)
    words[::3] = 7
    words[5], words[sum(lengths) :] = tables.word_embeddings.padding_idx, words[0]
    kinds = torch.randint(2, (tokens,), device=device)
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.full((padding,), 7)]).to(device)
    ends = torch.tensor([0, *lengths, padding]).cumsum(0).int().to(device)
    upstream = torch.randn(2, tokens, width, device=device)
    upstream[:, sum(lengths) :] = 0
    leaves = list(tables.parameters())
    tables.dropout.p = p
    seed = torch.tensor(3, device=device)
    out, half = embeddings.embed(tables, (words, kinds, positions), ends, 8, seed, torch.float16, Branch(device))
    factors = (out != 0) / (1 - p)
    assert float(factors.bool().float().mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / out.numel()) ** 0.5)
    tables.dropout.p = 0.0
    expected = tables(input_ids=words[None], token_type_ids=kinds[None], position_ids=positions[None])[0] * factors
    close(out, expected, torch.float32)
    close(half, expected, torch.float16)
    found = torch.autograd.grad([out, half], leaves, [upstream[0], upstream[1].half()])
    wanted = torch.autograd.grad(expected, leaves, upstream[0] + upstream[1].half().float())
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-4)


def test_words_gradients_wait_for_the_zeros_that_the_branch_writes(device):
    class Noted(Branch):
        def event(self):
            return "zeros"

        def wait(self, event):
            waited.append(event)

    waited = []
    tables = BertEmbeddings(BertConfig(vocab_size=9, hidden_size=16, max_position_embeddings=3, num_attention_heads=1)).to(device)
    ids = tuple(torch.tensor(x, device=device) for x in ([1, 2, 1], [0, 0, 0], [0, 1, 2]))
    ends, seed = torch.tensor([0, 3, 3], dtype=torch.int32, device=device), torch.tensor(0, device=device)
    out, _ = embeddings.embed(tables, ids, ends, 3, seed, torch.float16, Noted(device))
    assert waited == []
    out.sum().backward()
    assert waited == ["zeros"]
