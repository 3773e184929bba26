"""Masked language modelling on plain text, one of BERT's two pre-training tasks (Devlin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets import kernels
from bert_tickets.config import Config
from bert_tickets.data.mlm_dataset import Corpus, load_corpus
from bert_tickets.data.text_source import find_texts
from bert_tickets.errors import UserError
from bert_tickets.modeling.attention import gather
from bert_tickets.modeling.bert import Net, encode
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import Batch, at_least_fp32, ship
from bert_tickets.seeds import seeded
from bert_tickets.tasks import Outputs, Stores, Task
from bert_tickets.tasks.sanity import unknown_tokens

MASK_RATE = 0.15  # fraction of the tokens to predict
MASKED, RANDOM = 0.8, 0.1  # fractions of these that are replaced by [MASK], and by a random token; the others stay
IGNORED = -100  # the label of padding
CHUNK = 512  # tokens whose logits over the vocabulary are in memory at once in an evaluation


class Mlm(Task):
    """Masked language modelling."""

    name, metric = "mlm", "accuracy"
    rows = "any"
    mask_id: int
    vocabulary: int

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        return load_bert(cfg.model, "mlm", cfg.init, cfg.train.seed)

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[Corpus, dict[str, Corpus]]:
        if tokenizer.mask_token_id is None:
            raise UserError(f"the tokenizer of {cfg.model} has no [MASK], which masked language modelling needs")
        self.mask_id, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        texts = find_texts(cfg.data_dir)
        train = load_corpus(texts["train"], tokenizer, cfg.max_length, cfg.limit_train, device=device)
        masked = {"device": device, "augment_batch": self.mask_blocks}
        held_out = load_corpus(texts["validation"], tokenizer, cfg.max_length, cfg.limit_eval, **masked)
        print(
            f"{len(train):,} blocks of {cfg.max_length} tokens to train on, {len(held_out):,} to evaluate on; "
            f"their unigram entropy is {held_out.unigram_entropy:.3f} nats per token"
        )
        same = texts["train"].key == texts["validation"].key
        self.data_warnings = [
            *["the validation text is the training text"] * same,
            *unknown_tokens(train.blocks[:10_000], tokenizer, "train"),
            *unknown_tokens(held_out.blocks[:10_000], tokenizer, "validation"),
        ]
        return train, {"validation": held_out}

    def augment_batch(self, batch: Batch, step: int, seed: int) -> Batch:
        """Mask the training batch of a step. On CUDA all batches of one size have one shape, for CUDA graphs."""
        even = batch.input_ids.device.type == "cuda"
        return mask_tokens(batch, [seeded(seed, "masks", step)], self.mask_id, self.vocabulary, even=even)

    def mask_blocks(self, batch: Batch, blocks: Tensor) -> Batch:
        """Mask an evaluation batch. The masks of a block are the same in every run, for comparable metrics."""
        generators = [seeded(0, "evaluation masks", block) for block in blocks.tolist()]
        return mask_tokens(batch, generators, self.mask_id, self.vocabulary)

    def loss(self, net: Net, batch: Batch, states: list[Tensor] | None = None) -> Tensor:
        """Compute the mean cross-entropy of the masked tokens, in float32 at least. `states` is as in `encode`."""
        scores = _scores(net, _chosen(net, batch, states))
        if scores.dtype in (torch.float16, torch.bfloat16) and kernels.usable(scores.device):
            from bert_tickets.kernels.loss import cross_entropy

            total = cross_entropy(scores, batch.labels)
        else:
            total = F.cross_entropy(scores.to(at_least_fp32(scores)), batch.labels, reduction="sum", ignore_index=IGNORED)
        return total / (batch.labels != IGNORED).sum().clamp(min=1)  # a small batch may have no masked token

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """Compute for each masked token its negative log-likelihood in nats, and whether its logit is the highest: [M, 2]."""
        hidden, rows = _chosen(net, batch), []
        with torch.autocast(hidden.device.type, enabled=False):  # half-precision scores tie
            for part, labels in zip(hidden.to(at_least_fp32(hidden)).split(CHUNK), batch.labels.split(CHUNK), strict=True):
                scores = net.cls(part)
                losses, hits = F.cross_entropy(scores, labels, reduction="none"), scores.argmax(1) == labels
                rows.append(torch.stack([losses, hits.to(losses.dtype)], 1))
        return torch.cat(rows)

    def compute_metrics(self, outputs: Outputs, stores: Stores) -> dict[str, float]:
        """Compute accuracy (as in Table 2), the mean loss in nats and its exponential, from `outputs` in any order."""
        (values,) = outputs.values()
        if not len(values):
            raise UserError(
                "no token of the validation text is masked: it is too short, or --limit-eval or --max-length too small"
            )
        loss, accuracy = values.mean(axis=0, dtype=np.float64).tolist()
        return {"accuracy": accuracy, "loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def warnings(self, outputs: Outputs, stores: Stores) -> list[str]:
        """Return a warning if the loss is above the unigram entropy, and the warnings of the texts."""
        ((name, store),) = stores.items()
        loss, chance = self.compute_metrics(outputs, stores)["loss"], store.unigram_entropy
        above = f"loss {loss:.3f} on {name} is above the unigram entropy ({chance:.3f})"
        return [*self.data_warnings, *[above] * (loss > chance)]


def mask_tokens(
    batch: Batch, generators: Sequence[torch.Generator], mask_id: int, vocabulary: int, *, even: bool = False
) -> Batch:
    """Choose 15 % of a batch's tokens to predict, and mask them; drawn on the CPU by one generator, or by one per example.

    As in the released code's `mask_tokens`, each token except `[CLS]` and `[SEP]`, the first and last of an example, is chosen
    with probability 0.15, and then replaced by `[MASK]` (0.8), by any token of the vocabulary (0.1), or not at all (0.1). Never
    waits for the device. `even` pads the labels with `IGNORED`, so that all batches of T tokens have one shape (except one in
    10^9).
    """
    groups = np.array_split(batch.lengths if batch.shard is None else batch.shard.lengths, len(generators))
    draws = [_draw_masks(lengths, generator, mask_id, vocabulary) for lengths, generator in zip(groups, generators, strict=True)]
    chosen, shown = (torch.cat(parts) for parts in zip(*draws, strict=True))
    weight = batch.weight
    if batch.shard is not None:  # drawn for the whole batch, as by one process
        total, part = int(chosen.sum()), batch.shard.tokens
        chosen, shown = chosen[part], shown[part]
        # the loss is a mean over masked tokens, not over examples; without any it is 0
        weight = max(1, int(chosen.sum())) / max(1, total) if weight else 0.0
    places = chosen.nonzero()[:, 0]
    count, ids = len(places), batch.input_ids
    back = torch.where(chosen, chosen.cumsum(0) - 1, -1)
    if even:
        places = F.pad(places, (0, _even_size(len(chosen), count) - count))
    places, shown, back = (ship(x, ids.device) for x in (places, shown, back))
    labels = ids[0].index_select(0, places)
    labels[count:] = IGNORED
    shown = torch.where(shown < 0, ids, shown)
    return replace(batch, input_ids=shown, labels=labels, chosen=places, chosen_back=back, weight=weight)


def _draw_masks(lengths: np.ndarray, generator: torch.Generator, mask_id: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Draw for each of T tokens whether it is chosen, and the token that replaces it, or -1."""
    ends = torch.from_numpy(lengths.cumsum())
    chosen = torch.rand(int(ends[-1]), generator=generator) < MASK_RATE
    chosen[ends - torch.from_numpy(lengths)] = False
    chosen[ends - 1] = False
    kind = torch.rand(len(chosen), generator=generator)
    words = torch.randint(vocabulary, (len(chosen),), generator=generator)
    words[kind >= MASKED + RANDOM] = -1
    words[kind < MASKED] = mask_id
    return chosen, words.masked_fill_(~chosen, -1)


def _even_size(tokens: int, count: int) -> int:
    """Return a padded number of labels, at least `count`: six standard deviations above the mean, a multiple of 64."""
    usual = MASK_RATE * tokens + 6 * math.sqrt(MASK_RATE * (1 - MASK_RATE) * tokens)
    return math.ceil(max(count, usual) / 64) * 64


def _chosen(net: Net, batch: Batch, states: list[Tensor] | None = None) -> Tensor:
    """Compute the encoder's last hidden states of the masked tokens: [M, hidden]."""
    assert batch.chosen is not None
    assert batch.chosen_back is not None
    return gather(encode(net, batch, states), batch.chosen, batch.chosen_back.clamp(min=0), batch.chosen_back[:, None] < 0)


def _scores(net: Net, hidden: Tensor) -> Tensor:
    """Compute the logits over the vocabulary: [M, vocabulary]. In half precision on a GPU the vocabulary is padded to a multiple
    of 8, for fast matrix products; logits of padding are -inf."""
    device, decoder = hidden.device.type, net.cls.predictions.decoder
    more = -decoder.out_features % 8 if device == "cuda" and torch.is_autocast_enabled(device) else 0
    if not more:
        return net.cls(hidden)
    weight = F.pad(decoder.weight.to(torch.get_autocast_dtype(device)), (0, 0, 0, more))
    bias = F.pad(decoder.bias, (0, more), value=-math.inf)
    return F.linear(net.cls.predictions.transform(hidden), weight, bias)
