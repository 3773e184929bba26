"""Warnings about data on which metrics are meaningless: training data, or words that the tokenizer does not know."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

MAX_OVERLAP = 0.5  # fraction of an evaluation set that may be in the training set; GLUE's sets share a few sentences
MAX_UNKNOWN = 0.25  # fraction of [UNK] tokens; for BERT on English it is about 0.001


def overlap(train: Iterable[Hashable], evaluation: Sequence[Hashable], split: str, what: str) -> list[str]:
    """Warn if most examples of an evaluation set are in the training set too."""
    known = set(train)
    count = sum(example in known for example in evaluation)
    line = f"{count} of {len(evaluation)} {what} of {split} are in the training set"
    return [line] if count > MAX_OVERLAP * len(evaluation) else []


def unknown_tokens(ids: np.ndarray, tokenizer: Any, split: str) -> list[str]:
    """Warn if many of a text's tokens are [UNK], as with a vocabulary of another language."""
    unknown = float(np.mean(ids == tokenizer.unk_token_id)) if ids.size else 0.0
    line = f"{unknown:.0%} of the tokens of {split} are [UNK]: is the vocabulary of this language?"
    return [line] if unknown > MAX_UNKNOWN else []
