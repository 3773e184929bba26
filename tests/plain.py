"""Evaluate exported folders with plain transformers, in padded batches and without bert_tickets.

`python plain.py JOB` reads JOB/job.json, [task, folder, data] by name, and writes JOB/metrics.json by name: GLUE metrics from the
.tsv files, those of masked language modelling from inputs that were padded elsewhere; SQuAD's logits go to JOB/NAME.npy.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr, spearmanr
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

BATCH = 8


def open_net(kind, folder: str):
    net, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert next(net.parameters()).dtype == torch.float32
    return net.eval()


def glue(folder: str, path: str) -> dict[str, float]:
    """Accuracy by the names of the classes (RTE), or the correlations of the scores (STS-B)."""
    net, tokenizer = open_net(AutoModelForSequenceClassification, folder), AutoTokenizer.from_pretrained(folder)
    lines = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str)
    first, second, labels = (lines[name].tolist() for name in ("sentence1", "sentence2", lines.columns[-1]))
    logits = []
    for begin in range(0, len(first), BATCH):
        pairs = first[begin : begin + BATCH], second[begin : begin + BATCH]
        inputs = tokenizer(*pairs, truncation=True, max_length=128, padding=True, return_tensors="pt")
        logits += net(**inputs).logits.tolist()
    if net.config.problem_type == "regression":
        scores, gold = [score for (score,) in logits], [float(label) for label in labels]
        return {"pearson": float(pearsonr(scores, gold)[0]), "spearman": float(spearmanr(scores, gold)[0])}
    assert net.config.problem_type == "single_label_classification"
    classes = [net.config.id2label[int(np.argmax(values))] for values in logits]
    assert set(classes) == {"entailment", "not_entailment"}  # constant predictions would prove little
    return {"accuracy": float(np.mean([one == other for one, other in zip(labels, classes, strict=True)]))}


def batches(path: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """All arrays of a file, and the network's inputs among them in batches."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    names = ("input_ids", "token_type_ids", "attention_mask")
    count = len(arrays["input_ids"])
    return arrays, [{name: arrays[name][at : at + BATCH] for name in names} for at in range(0, count, BATCH)]


def squad(folder: str, path: str) -> np.ndarray:
    """The logits of starts and ends: [windows, tokens, 2]."""
    net, (_, inputs) = open_net(AutoModelForQuestionAnswering, folder), batches(path)
    outputs = [net(**batch) for batch in inputs]
    return torch.cat([torch.stack([o.start_logits, o.end_logits], 2) for o in outputs]).numpy()


def mlm(folder: str, path: str) -> dict[str, float]:
    net, (arrays, inputs) = open_net(AutoModelForMaskedLM, folder), batches(path)
    logits = torch.cat([net(**batch).logits for batch in inputs]).flatten(0, 1)[arrays["chosen"]]
    loss = torch.nn.functional.cross_entropy(logits, arrays["labels"]).item()
    hits = (logits.argmax(1) == arrays["labels"]).double().mean().item()
    return {"accuracy": hits, "loss": loss, "perplexity": float(np.exp(loss))}


@torch.inference_mode()
def main(job: Path) -> None:
    metrics = {}
    for name, (task, folder, data) in json.loads((job / "job.json").read_text()).items():
        found = {"rte": glue, "stsb": glue, "squad": squad, "mlm": mlm}[task](folder, data)
        if task == "squad":
            np.save(job / f"{name}.npy", found)
        else:
            metrics[name] = found
    assert not [name for name in sys.modules if name.startswith("bert_tickets")]
    (job / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
