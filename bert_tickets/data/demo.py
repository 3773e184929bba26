"""A generated sentiment task for the demo, in SST-2's file layout.

The opinion words of the evaluation set do not occur in training, and a third of the sentences are negated, so that the task
requires pre-training.

    python -m bert_tickets.data.demo --output DIR     writes DIR/SST-2/train.tsv and DIR/SST-2/dev.tsv
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.files import write

# (positive, negative) opinion words of the two sets, which have none in common.
TRAIN_WORDS = (
    "good great wonderful excellent lovely brilliant charming delightful superb funny clever touching beautiful fresh "
    "enjoyable impressive gripping smart warm graceful",
    "bad awful terrible poor boring dull silly weak ugly tedious clumsy annoying stupid bland lame messy stale "
    "unpleasant pointless ridiculous",
)
DEV_WORDS = (
    "fantastic amazing marvelous pleasant magnificent hilarious moving elegant remarkable fascinating terrific "
    "outstanding splendid witty captivating",
    "horrible dreadful mediocre disappointing lousy irritating dreary forgettable shallow pathetic unwatchable "
    "disgusting miserable sloppy tiresome",
)
SUBJECTS = [
    "the film", "this movie", "the story", "the plot", "the acting", "the script", "the whole cast", "the ending", "the music",
    "the dialogue", "the direction", "the first half", "the second act", "the main character", "every single scene",
    "the camera work", "the new version", "the last chapter", "their performance", "the opening scene",
]  # fmt: skip
PLAIN = [
    "{s} is {w}", "{s} was really {w}", "i found {s} {w}", "{s} turned out to be {w}", "what a {w} piece of work , {s} above all",
    "{s} seemed {w} to me", "we all thought {s} was {w}", "to my surprise {s} was quite {w}", "{s} : simply {w}",
    "honestly , {s} felt {w} from start to finish",
]  # fmt: skip
NEGATED = [
    "{s} is not {w}", "{s} was never {w}", "i did not find {s} {w}", "nobody would call {s} {w}", "{s} is anything but {w}",
    "{s} was not {w} at all", "there is nothing {w} about {s}", "i cannot say {s} was {w}",
]  # fmt: skip


def sentences(count: int, words: tuple[str, str], seed: int) -> Iterator[tuple[str, int]]:
    """Generate `count` different sentences with their labels (1 = positive), half of each; every third is negated."""
    rng = random.Random(seed)
    opinions = [part.split() for part in words]
    seen: set[str] = set()
    while len(seen) < count:
        number = len(seen)
        label, negated = number % 2, number % 3 == 0
        word = rng.choice(opinions[0 if label != negated else 1])
        text = rng.choice(NEGATED if negated else PLAIN).format(s=rng.choice(SUBJECTS), w=word)
        if text not in seen:
            seen.add(text)
            yield text, label


def main(args: argparse.Namespace) -> None:
    for file, count, words, seed in (("train.tsv", 1280, TRAIN_WORDS, 0), ("dev.tsv", 400, DEV_WORDS, 1)):
        path = Path(args.output) / "SST-2" / file
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in sentences(count, words, seed))]
        write(path, "\n".join([*lines, ""]).encode())
        print(f"{count} sentences in {path}")


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write the folder SST-2")
    run_command(main, parser.parse_args(normalize_argv()))
