"""Model cards: what the run records, metadata for the hub, no path of this machine, and examples that work."""

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from trainrun import KINDS

from bert_tickets.cli import parse
from bert_tickets.content import fingerprint
from bert_tickets.export.export import export
from bert_tickets.export.model_card import model_card
from bert_tickets.export.ticket import read_ticket
from bert_tickets.files import read_checksummed, read_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import result


@pytest.mark.parametrize(("task", "untrained"), [("mlm", False), ("stsb", True)])
def test_the_card_says_what_the_run_records(exported, task, untrained):
    run, trained, ticket = exported[task]
    text = ((ticket if untrained else trained) / "README.md").read_text()
    line, about = result(run, 1), read_checksummed(run / "run.json")
    assert bool(line["warnings"]) == (task == "mlm")
    for value in (
        f"{line['kept']:,} of {line['total']:,} weights kept",
        *(f"{name}{' once trained (not of these weights)' * untrained} | {v:.6g} |" for name, v in line["metrics"].items()),
        *(f"| warning | {warning} |" for warning in line["warnings"]),
        line["mask_sha256"],
        line["init_sha256"],
        about["fingerprint"]["model"],
        *("| seed | `57` |", "| lr | `0.001` |", "| rate | `0.4` |"),
        "level 1 of 0 to 1",
        f"torch {version('torch')}",
    ):
        assert value in text
    assert "| epochs |" not in text  # --max-steps decides
    data = ModelCard(text).data.to_dict()
    assert ("pipeline_tag" in data) == ("metrics" in data) == (not untrained)
    assert not {"base_model", "datasets", "model-index", "license"} & data.keys()  # the hub knows nothing of local folders


def test_a_search_is_exported_as_the_untrained_ticket_that_it_drew(train_task, tmp_path):
    run = train_task("rte", tmp_path, "--method", "early-bird", "--draw-at", "3", "--keep-models")
    export(run, tmp_path / "drawn", 0)
    export(run, tmp_path / "trained")
    text = (tmp_path / "drawn" / "README.md").read_text()
    accuracy = result(run, 0)["metrics"]["accuracy"]
    for words in (
        "They are not trained on the task.",
        f"| accuracy at the end of the search (not of these weights) | {accuracy:.6g} |",
        "| searched for | 3 steps",
        "The smaller network is trained from the weights before the search.",  # the method in a whole sentence
    ):
        assert words in text
    assert "metrics" not in ModelCard(text).data.to_dict()
    weights, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "drawn", run / "level_00" / "model"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    assert "The metrics below are those of this network." in (tmp_path / "trained" / "README.md").read_text()


def text_of(train_task, folder: Path, task: str, *words: str, untrained: bool = False) -> str:
    """The card of the newest level of a run."""
    export(train_task(task, folder / "runs", *words), folder / "o", untrained=untrained)
    return (folder / "o" / "README.md").read_text()


def test_the_card_of_an_untrained_ticket_names_the_step_that_it_rewinds_to(train_task, tmp_path):
    text = text_of(train_task, tmp_path, "rte", "--levels", "2", "--rewind", "3", untrained=True)
    assert "the weights to which the run rewinds (`--rewind 3`), under the mask" in text
    assert "it is that of the rewinding step." in text
    assert "not trained on the task" not in text


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("mlm", "--method mask-training --sparsity 0.5", "weights are as they were: the mask was trained, and the MLM head."),
        ("rte", "--method importance", "Its weights were not trained under the mask, but before."),
    ],
)
def test_the_card_says_what_was_trained(train_task, tmp_path, task, words, said):
    text = text_of(train_task, tmp_path, task, *words.split(), "--max-steps", "2")
    assert said in text
    assert "were trained on the task under the mask" not in text


def as_from_the_hub(run: Path, **config: object):
    """The card's metadata as if model and data had come from the hub."""
    ticket = read_ticket(run)
    cfg = replace(ticket.cfg, data_dir=None, **{"limit_eval": None, **config})
    return model_card(replace(ticket, cfg=cfg, model="bert-base-uncased"), "o", untrained=False).data


def test_the_metadata_for_the_hub(exported):
    run, metrics = exported["stsb"].run, ["pearsonr", "spearmanr"]
    found = as_from_the_hub(run)
    assert (found.base_model, found.datasets, found.metrics) == ("bert-base-uncased", ["nyu-mll/glue"], metrics)
    assert [each.metric_type for each in found.eval_results] == metrics
    for each in found.eval_results:
        assert (each.dataset_type, each.dataset_config, each.dataset_split) == ("nyu-mll/glue", "stsb", "validation")
        assert each.metric_value == result(run, 1)["metrics"][each.metric_name]
    assert as_from_the_hub(run, limit_eval=9).eval_results is None  # no metric of a part of the set


def test_a_given_mask_is_named_and_no_path_of_this_machine(exported, train_task, bert_dir, tmp_path):
    finder = exported["rte"].run
    export(train_task("squad", tmp_path, "--mask", finder / "level_01" / "mask.safetensors"), tmp_path / "o")
    text, base = (tmp_path / "o" / "README.md").read_text(), fingerprint(str(bert_dir))
    origin = f"base_model {base}, level 1, method imp, run {finder.name}, seed 57, task rte."
    assert f"The mask was given. Its file says: {origin}" in text
    assert "| mask | `sha256:" in text
    for path in (tmp_path / "o").iterdir():
        for place in (tmp_path, bert_dir.parent):
            assert str(place).encode() not in path.read_bytes(), path.name
    assert Mask.load(tmp_path / "o" / "mask.safetensors").info["base_model"] == base


@pytest.mark.parametrize("task", ["rte", "stsb", "squad", "mlm"])
def test_the_examples_of_the_card_work(exported, monkeypatch, task):
    for folder in exported[task][1:]:
        monkeypatch.chdir(folder.parent)
        text, names = (folder / "README.md").read_text(), {}
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(code, names)
        assert names["mask"] == Mask.load(folder / "mask.safetensors")
        if task in ("squad", "mlm"):  # transformers loads the pooler too
            stored = read_tensors(folder / "pooler.safetensors")
            assert all(torch.equal(t, stored[f"bert.pooler.{n}"]) for n, t in names["model"].pooler.named_parameters())
        else:
            assert names["outputs"].logits.shape == (1, 1 if task == "stsb" else 2)
        lines = [line.split()[1:] for line in text.splitlines() if line.startswith("python lt_")]
        assert len(lines) == 3
        for script, *words in lines:
            assert parse(KINDS[script], None, words).settings.mask == f"{task}/mask.safetensors"


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_the_card_of_a_ticket_of_units_loads_it_without_them(exported, slim_tickets, monkeypatch, task):
    folder, names = slim_tickets[task].trained, {}
    monkeypatch.chdir(folder.parent)
    text = (folder / "README.md").read_text()
    assert "The mask prunes heads and neurons. bert_tickets loads the network without them" in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]:
        exec(code, names)
    inputs = names["tokenizer"]("a good film", return_tensors="pt")
    dense, slim = (next(iter(model.eval()(**inputs).values())) for model in (names["model"], names["slim"]))
    torch.testing.assert_close(slim, dense, rtol=0, atol=1e-5)
    assert "bert_tickets.load(" not in (exported[task].trained / "README.md").read_text()
