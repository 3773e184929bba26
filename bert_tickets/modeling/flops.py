"""The arithmetic of a network: a multiplication and its addition are two operations."""

from __future__ import annotations

import numpy as np

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net

TRAINING = 3  # forward passes that a step costs: the backward pass computes two products for each of the forward's


def forward_flops(net: Net, lengths: np.ndarray, predicted: float = 0.0, units: Mask | None = None) -> int:
    """Count the operations of matrix products in a forward pass over packed examples of these lengths.

    `predicted` is the number of tokens whose words an MLM head predicts, `units` the heads [L, A] and neurons [L, I] to count
    (default: those that the layers have; they may be slim). Products alone count: projections, attention's two, which cost the
    square of each length, the feed-forward part, pooler and head. Embeddings, LayerNorm, softmax and activations do not.
    """
    config, examples, tokens = net.config, len(lengths), int(lengths.sum())
    hidden, squares = config.hidden_size, int((lengths.astype(np.int64) ** 2).sum())
    if units is None:
        heads = sum(layer.attention.self.num_attention_heads for layer in net.bert.encoder.layer)
        neurons = sum(len(layer.intermediate.dense.bias) for layer in net.bert.encoder.layer)
    else:
        heads, neurons = (int(units[kind].count_nonzero()) for kind in ("heads", "neurons"))
    attention = heads * (hidden // config.num_attention_heads)  # columns, over all layers
    products = 4 * tokens * hidden * attention + 2 * squares * attention + 2 * tokens * hidden * neurons
    if hasattr(net, "cls"):
        products += round(predicted * hidden * (hidden + config.vocab_size))
    elif hasattr(net, "qa_outputs"):
        products += tokens * hidden * net.qa_outputs.out_features
    else:
        products += examples * hidden * (hidden + net.classifier.out_features)
    return 2 * products
