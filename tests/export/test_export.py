"""Exported tickets: plain transformers opens them with the metric of the run, and nothing false is exported."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import export as script
import numpy as np
import pytest
import torch
import verify
from conftest import ROOT
from golden import padded
from safetensors.torch import load_file, save_file
from tickets import EXPORTED
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from bert_tickets import load_ticket
from bert_tickets.config import build, kind_of
from bert_tickets.errors import UserError
from bert_tickets.export.export import export
from bert_tickets.export.ticket import read_ticket
from bert_tickets.files import read_checksummed, read_facts, read_tensors, sha256_of, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.parameters import encoder_weights
from bert_tickets.runs.directory import result
from bert_tickets.tasks.create import create

ARCHITECTURES = {"glue": "BertForSequenceClassification", "squad": "BertForQuestionAnswering", "mlm": "BertForMaskedLM"}


@pytest.fixture
def copied(exported, tmp_path):
    """Copy a run, to be damaged."""
    return lambda name: Path(shutil.copytree(exported[name].run, tmp_path / "copy" / exported[name].run.name))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    pooler = folder / "pooler.safetensors"
    return load_file(folder / "model.safetensors") | (load_file(pooler) if pooler.exists() else {})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(*words: object) -> str:
    with pytest.raises((UserError, OSError)) as error:
        script.main(script.parse([str(word) for word in words]))
    return str(error.value)


# ---- plain transformers ----


@pytest.fixture(scope="module")
def evaluated(exported, tmp_path_factory) -> dict[str, dict]:
    """Each folder's metrics, by the logits of a process that imports transformers and not bert_tickets."""
    job, sets, metrics = tmp_path_factory.mktemp("job"), {}, {}
    for name, (run, _, _) in exported.items():
        cfg = read_ticket(run).cfg
        task = create(cfg.task)
        store = task.load_data(cfg, task.load_net(cfg)[1], torch.device("cpu"))[1]["validation"]
        batch = store.batch(torch.arange(len(store)))
        inputs = padded(batch)
        np.savez(job / f"{name}.npz", **inputs)
        sets[name] = task, store, batch, inputs["attention_mask"] == 1
    command = [sys.executable, ROOT / "tests" / "plain.py", *(each.trained for each in exported.values())]
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


@pytest.mark.parametrize("name", EXPORTED)
def test_plain_transformers_has_the_metric_of_the_run(exported, evaluated, name):
    expected = result(exported[name].run, 1)["metrics"]
    assert evaluated[name].keys() == expected.keys()
    for metric, value in expected.items():
        exact = metric in ("accuracy", "f1", "exact_match")
        assert evaluated[name][metric] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-5)), metric


@pytest.mark.parametrize("name", EXPORTED)
def test_a_folder_has_the_weights_and_the_mask_of_its_level(exported, tokenizer, name):
    run, folder, _ = exported[name]
    weights, trained = weights_of(folder), read_tensors(run / "level_01" / "weights.safetensors")
    kind = kind_of(EXPORTED[name][0])
    assert (folder / "pooler.safetensors").exists() == (kind != "glue")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == ([ARCHITECTURES[kind]], "float32")
    assert name != "rte" or config["id2label"] == {"0": "entailment", "1": "not_entailment"}
    loaded, _, mask = load_ticket(folder)
    assert type(loaded).__name__ == ARCHITECTURES[kind]
    assert all(torch.equal(p, weights[key]) for key, p in loaded.named_parameters())
    other, _ = create("mnli").load_net(build({"task": "mnli", "model": str(folder)}))  # as the base model of another task
    assert all(torch.equal(p, weights[key]) for key, p in encoder_weights(other).items())
    assert [*other.config.id2label.values()] == ["entailment", "neutral", "contradiction"]
    if name == "embeddings":  # plain transformers has two names for one bias, of which a run keeps one
        assert torch.equal(weights.pop("cls.predictions.decoder.bias"), trained["cls.predictions.bias"])
    assert weights.keys() == trained.keys()
    assert all(x.dtype == torch.float32 and torch.equal(x, trained[key]) for key, x in weights.items())
    assert mask.sha256() == result(run, 1)["mask_sha256"]
    assert mask.sparsity == pytest.approx(0.4, abs=1e-3)
    assert not any(weights[key][~kept].any() for key, kept in mask.items())
    assert verify.verify_weights(folder, None)
    text = "a naïve film, it's great"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


# ---- the untrained ticket ----


@pytest.mark.parametrize("name", ["rte", "stsb", "squad", "embeddings"])
def test_an_untrained_ticket_trained_gives_the_bits_of_the_level(exported, train_task, tmp_path, name):
    (task, words), ticket = EXPORTED[name], exported[name].untrained
    steps = words.split()[:2] if "--max-steps" in words else []
    again = result(train_task(task, tmp_path, *steps, "--model", ticket, "--mask", ticket / "mask.safetensors"), 0)
    level, same = result(exported[name].run, 1), ("init_sha256", "mask_sha256", "losses", "metrics", "kept")
    assert {key: again[key] for key in same} == {key: level[key] for key in same}
    assert not any("are these the same weights?" in warning for warning in again["warnings"])


def test_the_ticket_is_what_the_level_started_from(train_task, tmp_path):
    run = train_task("rte", tmp_path, "--levels", "3", "--rewind", "3", "--init", "random")
    for level in (0, 2):
        export(run, tmp_path / str(level), level, untrained=True)
        encoder = {key: tensor for key, tensor in weights_of(tmp_path / str(level)).items() if key.startswith("bert.")}
        assert sha256_of(encoder) == result(run, level)["init_sha256"]
    rewound = read_tensors(run / "rewind.safetensors")["classifier.weight"]
    assert torch.equal(weights_of(tmp_path / "2")["classifier.weight"], rewound)
    (run / "rewind.safetensors").unlink()
    assert "a missing rewind.safetensors" in error_of(run, tmp_path / "o", "--untrained")
    assert not (tmp_path / "o").exists()


# ---- which level, which base model ----


def test_an_older_level_needs_its_kept_model(exported, tmp_path):
    assert "has no trained weights" in error_of(exported["stsb"].run, tmp_path / "o", "--level", "0")
    assert "has no finished level 7; its levels are 0 to 1" in error_of(exported["stsb"].run, tmp_path / "o", "--level", "7")
    kept = exported["squad"].run / "level_00" / "model"
    export(exported["squad"].run, tmp_path / "squad", 0)
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
    assert not output.exists()


# ---- mistakes and damage ----


def test_a_folder_that_is_not_empty_is_left_alone(exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for output in ("full", "full/file"):
        assert f"{output} exists" in error_of(exported["stsb"].run, tmp_path / output)
    assert contents(tmp_path / "full") == {"file": b"mine"}


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
