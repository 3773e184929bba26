"""A BERT of three layers in float64, without dropout, whose weights are a formula of their place, and a batch for it.

Values of the released code on this network are in the tests of mask training.
"""

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.masking.straight_through import refresh
from bert_tickets.modeling.parameters import prunable
from bert_tickets.training.mask_scores import MaskedNetwork

QUERY, POOLER = "bert.encoder.layer.0.attention.self.query.weight", "bert.pooler.dense.weight"
WHICH = "matrices+embeddings"
IDS = [[3 + (7 * b + 5 * t + b * t) % 57 for t in range(12)] for b in range(8)]
LENGTHS = [6 + b % 7 for b in range(8)]


def formula_net():
    """A BERT of three layers in float64, without dropout, whose weights are a formula of their place."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    calm = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    made = BertForSequenceClassification(BertConfig(**sizes, **calm, max_position_embeddings=32, num_labels=2)).double().eval()
    with torch.no_grad():
        for j, (name, p) in enumerate(sorted(made.named_parameters())):
            u = torch.sin(0.618 * torch.arange(1, p.numel() + 1, dtype=torch.float64) ** 2 + j).view(p.shape)
            p.copy_(1 + 0.1 * u if name.endswith("LayerNorm.weight") else 0.1 * u if p.dim() == 1 else 0.3 * u)
    return made


def formula_store():
    """Eight examples of 6 to 12 tokens, of two classes in turn."""
    ids = [row[:length] for row, length in zip(IDS, LENGTHS, strict=True)]
    return TokenStore(Tokens.of(ids, [[0] * length for length in LENGTHS]), np.arange(8) % 2)


def formula_batch():
    """The examples, packed."""
    return formula_store().batch(torch.arange(8))


def student_of(net, mask):
    """The network under a mask, with scores in float64."""
    made = MaskedNetwork(net, mask)
    made.params(head=False)
    made.scores = {name: scores.detach().double().requires_grad_() for name, scores in made.scores.items()}
    return made


def start_of(net, rounding="round", sparsity=0.7):
    """One-shot pruning's mask per matrix."""
    magnitudes = {name: p.detach().abs() for name, p in prunable(net, WHICH).items()}
    return refresh(magnitudes, sparsity, rounding)[0]
