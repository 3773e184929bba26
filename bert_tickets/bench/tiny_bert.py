"""Generated checkpoints and datasets, for measurements and checks without the hub.

A BERT with random weights and a vocabulary of made-up words; MNLI, SQuAD and plain text in these words, with realistic lengths.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from itertools import islice, product
from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SYLLABLES = ["".join(pair) for pair in product("bcdfghjklmnprstvwxyz", "aeiou")]
WORDS = ["".join(pair) for pair in product(SYLLABLES, repeat=2)]
MNLI_TOKENS, MNLI_SPREAD = 37, 0.47  # of both sentences: mean, and standard deviation of the logarithm


def save_tokenizer(words: Iterable[str], folder: Path) -> int:
    """Save BERT's tokenizer with these tokens as its vocabulary, in order; returns its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return len(vocabulary)


def save_bert(folder: Path, **sizes: int) -> None:
    """Save a BERT with random weights and a tokenizer: BERT-base, or with other `sizes` (fields of BertConfig)."""
    import torch
    from transformers import BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = BertConfig(**sizes)
    words = [*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), *WORDS]
    longer = ("".join(parts) for parts in product(WORDS, SYLLABLES))
    words += islice(longer, max(0, config.vocab_size - len(words)))
    config.vocab_size = save_tokenizer(words[: config.vocab_size], folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def _sentence(rng: random.Random, length: int) -> list[str]:
    return rng.choices(WORDS[:2000], k=max(1, length))


def save_mnli(folder: Path, train: int, dev: int) -> None:
    """Write MNLI's files. A hypothesis repeats the premise's words, negates them, or has other ones."""
    rng = random.Random(0)
    (folder / "MNLI").mkdir(parents=True, exist_ok=True)
    for file, count in (("train", train), ("dev_matched", dev), ("dev_mismatched", dev)):
        lines = ["sentence1\tsentence2\tgold_label"]
        for number in range(count):
            length = rng.lognormvariate(math.log(MNLI_TOKENS) - MNLI_SPREAD**2 / 2, MNLI_SPREAD)
            premise, other = _sentence(rng, round(length * 0.6)), _sentence(rng, round(length * 0.4))
            same = premise[: len(other)]
            pairs = {"entailment": same, "contradiction": ["bobo", *same], "neutral": other}
            label = list(pairs)[number % 3]
            lines.append(f"{' '.join(premise)}\t{' '.join(pairs[label])}\t{label}")
        (folder / "MNLI" / f"{file}.tsv").write_text("\n".join(lines) + "\n")


def save_squad(folder: Path, train: int, dev: int) -> None:
    """Write SQuAD's files: paragraphs of 300 words, each with a question about one of them."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for file, count in (("train", train), ("dev", dev)):
        paragraphs = []
        for number in range(count):
            words = _sentence(rng, 300)
            at = rng.randrange(300)
            answer = {"text": words[at], "answer_start": len(" ".join(words[:at])) + (at > 0)}
            asked = {"id": f"{file}{number}", "question": f"bobo {words[at - 1]} bobo", "answers": [answer]}
            paragraphs.append({"context": " ".join(words), "qas": [asked]})
        text = json.dumps({"version": "1.1", "data": [{"title": "A", "paragraphs": paragraphs}]})
        (folder / f"{file}-v1.1.json").write_text(text)


def save_text(folder: Path, train: int, valid: int) -> None:
    """Write en.train and en.valid with these numbers of words."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for file, count in (("en.train", train), ("en.valid", valid)):
        (folder / file).write_text(" ".join(_sentence(rng, count)) + "\n")
