"""Generated checkpoints, for measurements and tests without the hub: BERT with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def save_tokenizer(words: Iterable[str], folder: Path) -> int:
    """Save BERT's tokenizer with these tokens as its vocabulary, in order; returns its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
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
    words = [*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS)]
    words += [f"[unused{number}]" for number in range(config.vocab_size - len(words))]
    save_tokenizer(words, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
