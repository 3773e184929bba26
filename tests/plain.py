"""What exported folders score under plain transformers, in padded batches and without a line of bert_tickets.

`python plain.py JOB` reads JOB/job.json, which names a folder and its data by task, and writes JOB/scores.json: GLUE's scores
from the .tsv files, the others' from inputs that were padded elsewhere; SQuAD's logits go to JOB/squad.npy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

BATCH = 8


def open_net(kind, folder: str):
    net, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert next(net.parameters()).dtype == torch.float32
    return net.eval()


def read_pairs(path: str) -> tuple[list[str], list[str], list[str]]:
    """First texts, second texts and labels as written."""
    header, *lines = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")]
    columns = [header.index("sentence1"), header.index("sentence2"), len(header) - 1]
    return tuple([line[at].strip() for line in lines] for at in columns)


def classify(folder: str, path: str) -> tuple[dict, list[str], list[float]]:
    """The configuration, the labels as written, and each example's class by its name, or its score."""
    net, tokenizer = open_net(AutoModelForSequenceClassification, folder), AutoTokenizer.from_pretrained(folder)
    first, second, labels = read_pairs(path)
    found = []
    for begin in range(0, len(first), BATCH):
        pairs = first[begin : begin + BATCH], second[begin : begin + BATCH]
        inputs = tokenizer(*pairs, truncation=True, max_length=128, padding=True, return_tensors="pt")
        logits = net(**inputs).logits
        found += logits[:, 0].tolist() if logits.shape[1] == 1 else [net.config.id2label[i] for i in logits.argmax(1).tolist()]
    return net.config.to_dict(), labels, found


def batches(path: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """All arrays of a file, and the network's inputs among them in batches."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    names = ("input_ids", "token_type_ids", "attention_mask")
    count = len(arrays["input_ids"])
    return arrays, [{name: arrays[name][at : at + BATCH] for name in names} for at in range(0, count, BATCH)]


@torch.inference_mode()
def main(job: Path) -> None:
    places = json.loads((job / "job.json").read_text())
    scores = {}

    config, labels, classes = classify(*places["rte"])
    assert config["problem_type"] == "single_label_classification"
    assert set(classes) == {"entailment", "not_entailment"}  # or any network might score the same
    scores["rte"] = {"accuracy": float(np.mean([one == other for one, other in zip(labels, classes, strict=True)]))}

    config, labels, values = classify(*places["stsb"])
    assert config["problem_type"] == "regression"
    gold = [float(label) for label in labels]
    scores["stsb"] = {"pearson": float(pearsonr(values, gold)[0]), "spearman": float(spearmanr(values, gold)[0])}

    folder, file = places["squad"]
    net, (_, inputs) = open_net(AutoModelForQuestionAnswering, folder), batches(file)
    outputs = [net(**batch) for batch in inputs]
    np.save(job / "squad.npy", torch.cat([torch.stack([o.start_logits, o.end_logits], 2) for o in outputs]).numpy())

    folder, file = places["mlm"]
    net, (arrays, inputs) = open_net(AutoModelForMaskedLM, folder), batches(file)
    logits = torch.cat([net(**batch).logits for batch in inputs]).flatten(0, 1)[arrays["chosen"]]
    loss = torch.nn.functional.cross_entropy(logits, arrays["labels"]).item()
    hits = (logits.argmax(1) == arrays["labels"]).double().mean().item()
    scores["mlm"] = {"accuracy": hits, "loss": loss, "perplexity": float(np.exp(loss))}

    assert not [name for name in sys.modules if name.startswith("bert_tickets")]
    (job / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
