"""Sentences with a word that tells their label, and folders of GLUE filled with them."""

import random
from pathlib import Path

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
OTHERS = ["film", "book", "plot", "cast", "song", "café", "naïve", "it's", "“quoted”", '"', "the", "a", "was", "is", "and"]


def sentence(rng: random.Random, label: int) -> str:
    """A few words with one that tells the label."""
    words = rng.choices(OTHERS, k=rng.randint(2, 9))
    words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
    return " ".join(words)


# The header of each task's .tsv (CoLA has none), and how a row is filled from (number, text a, text b, label).
LAYOUTS = {
    "CoLA": (None, lambda n, a, b, y: ["gj04", str(y), "" if y else "*", a]),
    "SST-2": ("sentence\tlabel", lambda n, a, b, y: [a, str(y)]),
    "MRPC": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", lambda n, a, b, y: [str(y), str(n), str(n + 1), a, b]),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        lambda n, a, b, y: [str(n), "g", "f", "2012", str(n), "s", "s", a, b, f"{1.25 + 2.5 * y:.3f}"],
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", lambda n, a, b, y: [str(n), "1", "2", a, b, str(y)]),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
        "\tsentence1\tsentence2\tlabel1\tgold_label",
        lambda n, a, b, y: [str(n), *["x"] * 7, a, b, *[["entailment", "neutral", "contradiction"][n % 2 + y]] * 2],
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", lambda n, a, b, y: [str(n), a, b, ["entailment", "not_entailment"][y]]),
    "RTE": ("index\tsentence1\tsentence2\tlabel", lambda n, a, b, y: [str(n), a, b, ["entailment", "not_entailment"][y]]),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", lambda n, a, b, y: [str(n), a, b, str(y)]),
}


def write_glue(root: Path) -> None:
    """Write all nine tasks: 44 training and 20 evaluation lines each, one of them far too long."""
    for folder, (header, fill) in LAYOUTS.items():
        (root / folder).mkdir()
        devs = ["dev_matched.tsv", "dev_mismatched.tsv"] if folder == "MNLI" else ["dev.tsv"]
        for file, count in [("train.tsv", 44), *((dev, 20) for dev in devs)]:
            rng = random.Random(f"{folder}/{file}")
            lines = [] if header is None else [header]
            for number in range(count):
                label = number % 2
                text = sentence(rng, label)
                if number == 7:
                    text = " ".join([text] * 30)
                lines.append("\t".join(fill(number, text, sentence(rng, label), label)))
            (root / folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
