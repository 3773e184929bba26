"""Exported tickets: plain transformers opens them with the metric of the run, and nothing false is exported."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import export as script
import numpy as np
import pytest
import torch
import verify
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM, AutoTokenizer

from bert_tickets import load_ticket
from bert_tickets.cli import parse as parse_run
from bert_tickets.cli import run_command
from bert_tickets.config import build, kind_of
from bert_tickets.content import fingerprint
from bert_tickets.errors import UserError
from bert_tickets.export.export import export
from bert_tickets.export.model_card import KINDS, model_card
from bert_tickets.export.ticket import read_ticket
from bert_tickets.files import read_checksummed, read_facts, read_tensors, sha256_of, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.methods import main as methods
from bert_tickets.modeling.parameters import WORD_EMBEDDINGS, encoder_weights
from bert_tickets.runs.directory import result, run_dir
from bert_tickets.sweep.jobs import TRAINING
from bert_tickets.tasks.create import create

ARCHITECTURES = {"glue": "BertForSequenceClassification", "squad": "BertForQuestionAnswering", "mlm": "BertForMaskedLM"}
# The runs that are exported: a task, and flags. Enough steps for RTE to predict both classes.
RUNS = {
    "rte": ("rte", "--max-steps 30 --keep-models"),
    "stsb": ("stsb", "--prunable neurons"),  # biases, and some matrices only
    "squad": ("squad", "--keep-models"),
    "mlm": ("mlm", ""),
    "embeddings": ("mlm", "--prunable matrices+embeddings"),
}
TASKS = list(RUNS)[:4]


@pytest.fixture(scope="session")
def train(commands):
    """Train a task with small settings; returns the run directory."""

    def run(task: str, folder: Path, *words: object) -> Path:
        kind = kind_of(task)
        own = ["--task", task] if kind == "glue" else []
        cfg = parse_run(kind, None, [*commands[KINDS[kind]["script"]], *own, "--output-dir", str(folder), *map(str, words)])
        methods.run(cfg)
        return run_dir(cfg)

    return run


@pytest.fixture(scope="session")
def runs(train, tmp_path_factory) -> dict[str, Path]:
    """Runs of two levels, 0 and 40 % pruned. No test changes them."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(task, folder, "--levels", 2, "--rate", 0.4, *words.split()) for name, (task, words) in RUNS.items()}


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory) -> dict[str, Path]:
    """The newest level of each run, trained."""
    return export_all(runs, tmp_path_factory.mktemp("exported"), untrained=False)


@pytest.fixture(scope="session")
def tickets(runs, tmp_path_factory) -> dict[str, Path]:
    """The newest level of each run, untrained."""
    return export_all(runs, tmp_path_factory.mktemp("tickets"), untrained=True)


def export_all(runs: dict[str, Path], folder: Path, untrained: bool) -> dict[str, Path]:
    for name, run in runs.items():
        export(run, folder / name, untrained=untrained)
    return {name: folder / name for name in runs}


@pytest.fixture
def copied(runs, tmp_path):
    """Copy a run, to be damaged."""
    return lambda name: Path(shutil.copytree(runs[name], tmp_path / "copy" / runs[name].name))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    pooler = folder / "pooler.safetensors"
    return load_file(folder / "model.safetensors") | (load_file(pooler) if pooler.exists() else {})


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "level_01" / "weights.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(*words: object) -> str:
    with pytest.raises((UserError, OSError)) as error:
        script.main(script.parse([str(word) for word in words]))
    return str(error.value)


# ---- plain transformers ----


@pytest.fixture(scope="session")
def evaluated(runs, exported, tmp_path_factory) -> dict[str, dict]:
    """Each folder's metrics, by the logits of a process that imports transformers and not bert_tickets."""
    job, sets, metrics = tmp_path_factory.mktemp("job"), {}, {}
    for name, run in runs.items():
        cfg = read_ticket(run).cfg
        task = create(cfg.task)
        store = task.load_data(cfg, task.load_net(cfg)[1], torch.device("cpu"))[1]["validation"]
        batch = store.batch(torch.arange(len(store)))
        packed = {"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids}
        packed["attention_mask"] = torch.ones_like(batch.input_ids)
        padded = {key: pad_sequence(x[0].split(batch.lengths.tolist()), batch_first=True) for key, x in packed.items()}
        np.savez(job / f"{name}.npz", **padded)
        sets[name] = task, store, batch, padded["attention_mask"] == 1
    command = [sys.executable, ROOT / "tests" / "plain.py", *exported.values()]
    ran = subprocess.run(command, cwd=job, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert not re.search("UNEXPECTED|MISSING|newly initialized|not used|[Ww]arning", ran.stdout + ran.stderr)
    for name, (task, store, batch, attended) in sets.items():
        predicted = torch.from_numpy(np.load(job / f"{name}.npy"))
        if task.name in ("squad", "mlm"):  # predictions for tokens
            predicted = predicted[attended]
        if task.name == "rte":
            assert len(predicted.argmax(1).unique()) == 2  # constant predictions would prove little
        if task.name == "mlm":
            scores, labels = predicted[batch.chosen], batch.labels
            predicted = torch.stack([cross_entropy(scores, labels, reduction="none"), scores.argmax(1) == labels], 1)
        metrics[name] = task.compute_metrics({"validation": predicted.numpy()}, {"validation": store})
    return metrics


@pytest.mark.parametrize("name", RUNS)
def test_plain_transformers_has_the_metric_of_the_run_with_zeros_in_place(runs, exported, evaluated, tokenizer, name):
    line, folder = result(runs[name], 1), exported[name]
    assert evaluated[name].keys() == line["metrics"].keys()
    for metric, value in line["metrics"].items():
        exact = metric in ("accuracy", "f1", "exact_match")
        assert evaluated[name][metric] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-5)), metric
    mask, trained, weights = Mask.load(folder / "mask.safetensors"), trained_weights(runs[name]), weights_of(folder)
    loaded, _, own = load_ticket(folder)
    assert own == mask
    assert type(loaded).__name__ == ARCHITECTURES[kind_of(RUNS[name][0])]
    assert all(torch.equal(p, weights[key]) for key, p in loaded.named_parameters())
    assert verify.verify_weights(folder, None)
    assert (folder / "pooler.safetensors").exists() == (RUNS[name][0] in ("squad", "mlm"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == ([ARCHITECTURES[kind_of(RUNS[name][0])]], "float32")
    assert name != "rte" or config["id2label"] == {"0": "entailment", "1": "not_entailment"}
    if name == "embeddings":  # plain transformers has two names for one bias, of which a run keeps one
        assert torch.equal(weights.pop("cls.predictions.decoder.bias"), trained["cls.predictions.bias"])
    assert weights.keys() == trained.keys()
    assert all(x.dtype == torch.float32 and torch.equal(x, trained[key]) for key, x in weights.items())
    assert mask.sparsity == pytest.approx(0.4, abs=1e-3)
    assert not any(weights[key][~kept].any() for key, kept in mask.items())
    assert mask.sha256() == line["mask_sha256"]
    text = "a naïve film, it's great"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_an_untied_decoder_is_exported_with_its_own_weights(exported):
    """The mask covers the word embeddings, and must not prune the decoder."""
    folder = exported["embeddings"]
    plain = AutoModelForMaskedLM.from_pretrained(folder)
    embeddings, decoder = plain.bert.embeddings.word_embeddings.weight, plain.cls.predictions.decoder.weight
    pruned = ~Mask.load(folder / "mask.safetensors")[WORD_EMBEDDINGS]
    assert pruned.any()
    assert not embeddings[pruned].any()
    assert decoder[pruned].all()


def test_an_exported_folder_is_a_base_model_of_other_tasks(exported, capsys):
    net, _ = create("mnli").load_net(build({"task": "mnli", "model": str(exported["squad"])}))
    assert "no pooler" not in capsys.readouterr().out  # the ticket's own is found
    stored = weights_of(exported["squad"])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder_weights(net).items())
    assert net.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


# ---- the untrained ticket ----


@pytest.mark.parametrize("name", ["rte", "stsb", "squad", "embeddings"])
def test_an_untrained_ticket_trained_gives_the_bits_of_the_level(runs, tickets, train, tmp_path, name):
    task, words = RUNS[name]
    steps = words.split()[:2] if "--max-steps" in words else []
    run = train(task, tmp_path, *steps, "--model", tickets[name], "--mask", tickets[name] / "mask.safetensors")
    again, level = result(run, 0), result(runs[name], 1)
    same = ("init_sha256", "mask_sha256", "losses", "metrics", "kept")
    assert {key: again[key] for key in same} == {key: level[key] for key in same}
    assert not any("are these the same weights?" in warning for warning in again["warnings"])


def test_the_ticket_is_what_the_level_started_from(train, tmp_path):
    run = train("rte", tmp_path, "--levels", "3", "--rewind", "3", "--init", "random")
    export(run, tmp_path / "dense", 0, untrained=True)
    export(run, tmp_path / "ticket", 2, untrained=True)
    for level, name in ((0, "dense"), (2, "ticket")):
        encoder = {key: tensor for key, tensor in weights_of(tmp_path / name).items() if key.startswith("bert.")}
        assert sha256_of(encoder) == result(run, level)["init_sha256"]
    rewound = read_tensors(run / "rewind.safetensors")["classifier.weight"]
    assert torch.equal(weights_of(tmp_path / "ticket")["classifier.weight"], rewound)
    (run / "rewind.safetensors").unlink()
    assert "a missing rewind.safetensors" in error_of(run, tmp_path / "o", "--untrained")


def test_without_rewinding_only_trained_weights_are_exported(train, tmp_path):
    run = train("rte", tmp_path, "--levels", "2", "--rewind", "none")
    assert "started from weights that the run no longer has" in error_of(run, tmp_path / "o", "--untrained")
    assert not (tmp_path / "o").exists()
    export(run, tmp_path / "trained")
    export(run, tmp_path / "dense", 0, untrained=True)


# ---- which level, which base model ----


def test_an_older_level_needs_its_kept_model(runs, tmp_path):
    assert "has no trained weights" in error_of(runs["stsb"], tmp_path / "o", "--level", "0")
    kept = runs["squad"] / "level_00" / "model"
    export(runs["squad"], tmp_path / "squad", 0)
    found = contents(tmp_path / "squad")
    assert all(found[path.name] == path.read_bytes() for path in kept.glob("*.safetensors"))
    assert "pooler.safetensors" in found


def test_a_kept_model_needs_no_base_model_and_a_moved_one_is_given(copied, bert_dir, tmp_path):
    run = copied("rte")
    about = read_checksummed(run / "run.json")
    about["differs_from_preset"]["model"] = str(tmp_path / "gone")
    write_checksummed(run / "run.json", about)
    export(run, tmp_path / "kept")
    shutil.rmtree(run / "level_01" / "model")
    assert "cannot be exported without its base model: cannot load" in error_of(run, tmp_path / "o")
    export(run, tmp_path / "moved", model=str(bert_dir))
    kept, moved = contents(tmp_path / "kept"), contents(tmp_path / "moved")
    assert {name for name in kept if kept[name] != moved.get(name)} <= {"README.md"}
    assert "is_local" not in kept["tokenizer_config.json"].decode()


def test_another_base_model_is_an_error(copied, bert_dir, tmp_path):
    run, output = copied("stsb"), tmp_path / "o"
    other = shutil.copytree(bert_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 5] += 1
    (other / "model.safetensors").unlink()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for words in (["--untrained"], []):
        assert "the model differs" in error_of(run, output, "--model", other, *words)
    config = json.loads((other / "config.json").read_text()) | {"hidden_act": "relu"}
    (other / "config.json").write_text(json.dumps(config))
    assert "the architecture differs" in error_of(run, output, "--model", other)
    write_checksummed(run / "level_01" / "metrics.json", result(run, 1) | {"init_sha256": "0" * 64})
    assert "(init_sha256)" in error_of(run, output, "--untrained")
    assert not output.exists()


# ---- mistakes and damage ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (". o", ". is not a run directory: it has no run.json"),
        ("RUN o --level 7", "has no finished level 7; its levels are 0 to 1"),
        ("RUN full/file", "full/file exists"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(runs, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(SystemExit) as end:
        run_command(script.main, script.parse([str(runs["stsb"]) if word == "RUN" else word for word in words.split()]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert Path("full/file").read_text() == "mine"


def test_a_damaged_run_is_an_error_and_leaves_nothing(copied, tmp_path):
    run, output = copied("stsb"), tmp_path / "out" / "o"
    mask, weights = run / "level_01" / "mask.safetensors", run / "level_01" / "weights.safetensors"
    sound, tensors, facts = mask.read_bytes(), read_tensors(weights), read_facts(weights)
    shutil.copy(run / "level_00" / "mask.safetensors", mask)  # sound, but of another level
    for words in ([], ["--untrained"]):
        assert "is not the mask that metrics.json names" in error_of(run, output, *words)
    mask.write_bytes(sound)
    name, kept = next((name, kept) for name, kept in Mask.load(mask).items() if not kept.all())
    tensors[name][tuple((~kept).nonzero()[0])] = 1e-3
    write_tensors(weights, tensors, facts)
    assert f"nonzero weights in {name} that the mask prunes" in error_of(run, output)
    kept = copied("squad") / "level_00" / "model" / "pooler.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "pooler.safetensors is damaged" in error_of(kept.parents[2], output, "--level", "0")
    assert list(output.parent.glob("*")) == list(output.parent.glob(".*")) == []


# ---- the card ----


@pytest.mark.parametrize(("task", "untrained"), [("squad", False), ("stsb", True)])
def test_the_card_says_what_the_run_records(runs, exported, tickets, task, untrained):
    text = ((tickets if untrained else exported)[task] / "README.md").read_text()
    line, about = result(runs[task], 1), read_checksummed(runs[task] / "run.json")
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


def as_from_the_hub(run: Path, **config: object):
    """The ticket as if model and data had come from the hub."""
    ticket = read_ticket(run)
    cfg = replace(ticket.cfg, data_dir=None, **{"limit_eval": None, **config})
    return replace(ticket, cfg=cfg, model="bert-base-uncased")


def test_the_metadata_for_the_hub(runs):
    ticket = as_from_the_hub(runs["stsb"])
    found = model_card(ticket, "o", untrained=False).data
    metrics = ["pearsonr", "spearmanr"]
    assert (found.base_model, found.datasets, found.metrics) == ("bert-base-uncased", ["nyu-mll/glue"], metrics)
    assert [each.metric_type for each in found.eval_results] == metrics
    for each in found.eval_results:
        assert (each.dataset_type, each.dataset_config, each.dataset_split) == ("nyu-mll/glue", "stsb", "validation")
        assert each.metric_value == ticket.result["metrics"][each.metric_name]
    part = as_from_the_hub(runs["stsb"], limit_eval=9)
    assert model_card(part, "o", untrained=False).data.eval_results is None  # no metric of a part of the set


def test_a_given_mask_is_named_and_no_path_of_this_machine(runs, train, bert_dir, tmp_path):
    run = train("squad", tmp_path, "--mask", runs["rte"] / "level_01" / "mask.safetensors")
    script.main(script.parse([str(run), str(tmp_path / "o")]))
    text = (tmp_path / "o" / "README.md").read_text()
    base = fingerprint(str(bert_dir))
    origin = f"base_model {base}, level 1, method imp, run {runs['rte'].name}, seed 57, task rte."
    assert f"The mask was given. Its file says: {origin}" in text
    assert "| mask | `sha256:" in text
    for name, content in contents(tmp_path / "o").items():
        for place in (tmp_path, bert_dir.parent):
            assert str(place).encode() not in content, name
    assert Mask.load(tmp_path / "o" / "mask.safetensors").info["base_model"] == base


@pytest.mark.parametrize("task", TASKS)
def test_the_examples_of_the_card_work(exported, tickets, monkeypatch, task):
    for folder in (exported[task], tickets[task]):
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
        for name, *words in lines:
            assert parse_run(TRAINING[name], None, words).settings.mask == f"{task}/mask.safetensors"
