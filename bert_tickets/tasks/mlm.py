"""Masked language modelling on plain text: what BERT was pre-trained for (Devlin et al. 2019), one of its two tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import Store
from bert_tickets.data.mlm_dataset import Corpus, load_corpus
from bert_tickets.data.text_source import find_texts
from bert_tickets.errors import UserError
from bert_tickets.modeling.bert import Net, encode
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import Batch, ship
from bert_tickets.seeds import seeded
from bert_tickets.tasks.sanity import unread

SHARE = 0.15  # of the tokens are to be predicted
MASKED, RANDOM = 0.8, 0.1  # of these show [MASK], or a random token; the others show themselves
NONE = -100  # the label of a place without one
TOGETHER = 512  # tokens whose scores over the vocabulary exist at once in an evaluation


class Mlm:
    """The task, as `bert_tickets.tasks.Task` asks."""

    name = "mlm"
    metric = "accuracy"
    rows: Literal["any"] = "any"
    mask_id: int
    vocabulary: int
    data_warnings: Sequence[str] = ()  # what the texts say against every score

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        return load_bert(cfg.model, "mlm", cfg.init, cfg.train.seed)

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[Corpus, dict[str, Corpus]]:
        if tokenizer.mask_token_id is None:
            raise UserError(f"the tokenizer of {cfg.model} has no [MASK], which masked language modelling needs")
        self.mask_id, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        texts = find_texts(cfg.data_dir)
        train = load_corpus(texts["train"], tokenizer, cfg.max_length, cfg.limit_train, device)
        held_out = load_corpus(texts["validation"], tokenizer, cfg.max_length, cfg.limit_eval, device, self.fix)
        print(
            f"{len(train):,} blocks of {cfg.max_length} tokens to train on, {len(held_out):,} to evaluate on; "
            f"knowing these ones' frequencies alone loses {held_out.unigram_entropy:.3f} nats a token"
        )
        same = ["the validation text is the training text"] if texts["train"].key == texts["validation"].key else []
        self.data_warnings = [
            *same,
            *unread(train.first(), tokenizer, "train"),
            *unread(held_out.first(), tokenizer, "validation"),
        ]
        return train, {"validation": held_out}

    def augment_batch(self, batch: Batch, step: int, seed: int) -> Batch:
        """A training batch with the masks of its step. On CUDA all batches of one size have one shape, for CUDA graphs."""
        even = batch.input_ids.device.type == "cuda"
        return mask_tokens(batch, [seeded(seed, "masks", step)], self.mask_id, self.vocabulary, even=even)

    def fix(self, batch: Batch, blocks: Tensor) -> Batch:
        """An evaluation batch with the masks of its blocks, the same in every run: all are scored on the same tokens."""
        generators = [seeded(0, "evaluation masks", block) for block in blocks.tolist()]
        return mask_tokens(batch, generators, self.mask_id, self.vocabulary)

    def loss(self, net: Net, batch: Batch) -> Tensor:
        """The mean cross-entropy of the masked tokens, from scores in float32 at least. The head sees no other token."""
        scores = _scores(net, _chosen(net, batch))
        total = F.cross_entropy(scores.to(_wide(scores)), batch.labels, reduction="sum", ignore_index=NONE)
        return total / (batch.labels != NONE).sum().clamp(min=1)  # a batch of a few tokens may have none that is masked

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """Of each masked token the negative log-likelihood in nats, and 1 where it scores highest, else 0: [M, 2]."""
        hidden, rows = _chosen(net, batch), []
        with torch.autocast(hidden.device.type, enabled=False):  # half-precision scores tie, and the lower index then wins
            for part, labels in zip(hidden.to(_wide(hidden)).split(TOGETHER), batch.labels.split(TOGETHER), strict=True):
                scores = net.cls(part)
                hits = scores.argmax(1) == labels
                rows.append(torch.stack([F.cross_entropy(scores, labels, reduction="none"), hits.to(scores.dtype)], 1))
        return torch.cat(rows)

    def compute_metrics(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store]) -> dict[str, float]:
        """Accuracy (Table 2's), the mean loss in nats and its exponential, from `outputs` in any order."""
        (values,) = outputs.values()
        if not len(values):
            raise UserError(
                "no token of the validation text is masked: it is too short, or --limit-eval or --max-length too small"
            )
        loss, accuracy = values.mean(axis=0, dtype=np.float64).tolist()
        return {"accuracy": accuracy, "loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def warnings(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store]) -> list[str]:
        """Whether the loss is above what knowing the tokens' frequencies alone loses. And what the texts themselves say."""
        ((name, store),) = stores.items()
        loss, known = self.compute_metrics(outputs, stores)["loss"], getattr(store, "unigram_entropy", math.inf)
        above = f"loss {loss:.3f} on {name} is above {known:.3f}, which knowing no context gives"
        return [*self.data_warnings, *[above] * (loss > known)]

    def compare_with_evaluate(
        self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store], ours: Mapping[str, float]
    ) -> str:
        return "metrics not compared with evaluate, which has none for masked tokens"


def mask_tokens(
    batch: Batch, generators: Sequence[torch.Generator], mask_id: int, vocabulary: int, *, even: bool = False
) -> Batch:
    """The batch with 15 % of its tokens to predict, drawn on the CPU by one generator for all, or one for each example.

    As the released code's `mask_tokens`: each token but the first and the last of an example, which are `[CLS]` and `[SEP]`,
    is chosen with probability 0.15; it then shows `[MASK]` (0.8), any token of the vocabulary (0.1) or itself (0.1). The draws
    ask nothing of the tokens, so that nobody waits for the device. `even` adds places without a label, as many as give every
    batch of T tokens the same number (all but one in 10^9).
    """
    groups = np.array_split(batch.lengths if batch.shard is None else batch.shard.lengths, len(generators))
    draws = [_draw(lengths, generator, mask_id, vocabulary) for lengths, generator in zip(groups, generators, strict=True)]
    chosen, shown = (torch.cat(parts) for parts in zip(*draws, strict=True))
    weight = batch.weight
    if batch.shard is not None:  # drawn for the whole batch, as one process would
        total, part = int(chosen.sum()), batch.shard.tokens
        chosen, shown = chosen[part], shown[part]
        weight = int(chosen.sum()) / max(1, total) if weight else 0.0  # the mean is over masked tokens, not examples
    places = chosen.nonzero()[:, 0]
    count, ids = len(places), batch.input_ids
    if even:
        places = F.pad(places, (0, _room(len(chosen), count) - count))
    places, shown = ship(places, ids.device), ship(shown, ids.device)
    labels = ids[0].index_select(0, places)
    labels[count:] = NONE
    return replace(batch, input_ids=torch.where(shown < 0, ids, shown), labels=labels, chosen=places, weight=weight)


def _draw(lengths: np.ndarray, generator: torch.Generator, mask_id: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Of each of T tokens whether it is chosen, and what it then shows; -1 where it shows itself."""
    ends = torch.from_numpy(lengths.cumsum())
    chosen = torch.rand(int(ends[-1]), generator=generator) < SHARE
    chosen[ends - torch.from_numpy(lengths)] = False
    chosen[ends - 1] = False
    kind = torch.rand(len(chosen), generator=generator)
    words = torch.randint(vocabulary, (len(chosen),), generator=generator)
    words[kind >= MASKED + RANDOM] = -1
    words[kind < MASKED] = mask_id
    return chosen, words.masked_fill_(~chosen, -1)


def _room(tokens: int, count: int) -> int:
    """Places for `count` chosen tokens: as many as six standard deviations above the mean, in steps of 64."""
    usual = SHARE * tokens + 6 * math.sqrt(SHARE * (1 - SHARE) * tokens)
    return math.ceil(max(count, usual) / 64) * 64


def _chosen(net: Net, batch: Batch) -> Tensor:
    """The encoder's last hidden states of the masked tokens: [M, hidden]."""
    assert batch.chosen is not None
    return encode(net, batch).index_select(0, batch.chosen)


def _scores(net: Net, hidden: Tensor) -> Tensor:
    """The scores of the vocabulary: [M, words]. In half precision on a GPU its size is padded to a multiple of 8, as fast
    matrix products ask there; scores of padding are -inf."""
    device, decoder = hidden.device.type, net.cls.predictions.decoder
    more = -decoder.out_features % 8 if device == "cuda" and torch.is_autocast_enabled(device) else 0
    if not more:
        return net.cls(hidden)
    weight = F.pad(decoder.weight.to(torch.get_autocast_dtype(device)), (0, 0, 0, more))
    bias = F.pad(decoder.bias, (0, more), value=-math.inf)
    return F.linear(net.cls.predictions.transform(hidden), weight, bias)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
