"""What data say against every score on them: they were trained on, or the network cannot read them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

MOST = 0.5  # of an evaluation set may be trained on before it is said: GLUE's own sets share a few sentences
UNKNOWN = 0.25  # of the tokens likewise; of English it is a thousandth to BERT


def shared(train: Iterable[Hashable], evaluation: Sequence[Hashable], split: str, what: str) -> list[str]:
    """Whether most of an evaluation set's examples are in the training set too."""
    known = set(train)
    count = sum(example in known for example in evaluation)
    return [f"{count} of {len(evaluation)} {what} of {split} are trained on too"] if count > MOST * len(evaluation) else []


def unread(ids: np.ndarray, tokenizer: Any, split: str) -> list[str]:
    """Whether many of a text's tokens are [UNK]: another language's, or a tokenizer that does not find its words."""
    share = float(np.mean(ids == tokenizer.unk_token_id)) if ids.size else 0.0
    return [f"{share:.0%} of the tokens of {split} are [UNK]: is the vocabulary of this language?"] if share > UNKNOWN else []
