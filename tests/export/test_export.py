"""A ticket leaves its run: plain transformers opens the folder and scores what the run reported, and nothing false gets out."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import padded
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_session import SCRIPTS, Killed, dying

import bert_tickets.export.export
import bert_tickets.files
from bert_tickets.cli import parse as parse_script
from bert_tickets.cli import run_command
from bert_tickets.config import build, flat, of_flat, preset_of
from bert_tickets.errors import UserError
from bert_tickets.export.export import export, main, parse
from bert_tickets.export.model_card import card, front_matter
from bert_tickets.files import read_checksummed, read_facts, read_tensors, sha256_of, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.parameters import encoder_weights
from bert_tickets.runs.session import Run
from bert_tickets.runs.tickets import find
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import Squad

ROOT = Path(__file__).parent.parent
TASKS = {"rte": "lt_glue.py", "stsb": "lt_glue.py", "squad": "lt_squad.py", "mlm": "lt_pretrain.py"}


def words_of(task: str, commands: dict[str, list[str]], *extra: object) -> list[str]:
    own = {"rte": ["--max-steps", "30"], "stsb": ["--task", "stsb"]}  # enough steps to say both classes
    return [*commands[TASKS[task]], *own.get(task, []), *map(str, extra)]


def run_task(task: str, commands: dict[str, list[str]], folder: Path, *extra: object) -> Path:
    """Run a task's script with small settings; its run directory."""
    module, preset = SCRIPTS[TASKS[task]]
    cfg = parse_script(preset, None, words_of(task, commands, "--output-dir", folder, *extra))
    module.main(cfg)
    return Run(cfg, preset).dir


def line_of(run: Path, level: int) -> dict:
    return read_checksummed(run / f"level_{level:02d}" / "metrics.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def runs(commands, tmp_path_factory) -> dict[str, Path]:
    """A run of two levels, 0 and 40 % removed, for each task; RTE's and SQuAD's keep their models. No test changes them."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["--levels", "2", "--rate", "0.4"]
    return {task: run_task(task, commands, folder, *words, *["--keep-models"] * (task in ("rte", "squad"))) for task in TASKS}


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory) -> dict[str, Path]:
    """The newest level of each run, trained."""
    folder = tmp_path_factory.mktemp("exported")
    for task, run in runs.items():
        export(run, folder / task)
    return {task: folder / task for task in runs}


@pytest.fixture(scope="session")
def tickets(runs, tmp_path_factory) -> dict[str, Path]:
    """The newest level of each run, untrained."""
    folder = tmp_path_factory.mktemp("tickets")
    for task, run in runs.items():
        export(run, folder / task, untrained=True)
    return {task: folder / task for task in runs}


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of a run, to be spoilt."""

    def copy(task: str) -> Path:
        return Path(shutil.copytree(runs[task], tmp_path / "copy" / runs[task].name))

    return copy


# ---- plain transformers ----


@pytest.fixture(scope="session")
def evaluated(exported, commands, tmp_path_factory) -> dict[str, dict]:
    """Each task's scores from a process that knows nothing of bert_tickets."""
    job, data, adapters = tmp_path_factory.mktemp("job"), {}, {"squad": Squad(), "mlm": Mlm()}
    for task, adapter in adapters.items():
        cfg = parse_script(preset_of(task), None, words_of(task, commands))
        _, tokenizer = adapter.load_net(cfg)
        _, stores = adapter.load_data(cfg, tokenizer, torch.device("cpu"))
        batch = stores["validation"].batch(torch.arange(len(stores["validation"])))
        chosen = {} if batch.chosen is None else {"chosen": batch.chosen, "labels": batch.labels}
        data[task] = {name: tensor.numpy() for name, tensor in (padded(batch) | chosen).items()}
        np.savez(job / f"{task}.npz", **data[task])
    glue = commands["lt_glue.py"][commands["lt_glue.py"].index("--data-dir") + 1]
    places = {"rte": f"{glue}/RTE/dev.tsv", "stsb": f"{glue}/STS-B/dev.tsv"} | {task: str(job / f"{task}.npz") for task in data}
    (job / "job.json").write_text(json.dumps({task: [str(exported[task]), place] for task, place in places.items()}))
    script = [sys.executable, str(ROOT / "tests" / "plain.py"), "."]
    ran = subprocess.run(script, cwd=job, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert not re.search("UNEXPECTED|MISSING|newly initialized|not used|[Ww]arning", ran.stdout + ran.stderr)
    logits = np.load(job / "squad.npy")[data["squad"]["attention_mask"] == 1]
    return json.loads((job / "scores.json").read_text()) | {"squad": adapters["squad"].score({"validation": logits}, {})}


@pytest.mark.parametrize("task", TASKS)
def test_plain_transformers_scores_what_the_run_reported(runs, evaluated, task):
    reported = line_of(runs[task], 1)["metrics"]
    assert evaluated[task].keys() == reported.keys()
    for name, value in reported.items():
        exact = name in ("accuracy", "f1", "exact_match")
        assert evaluated[task][name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-5)), name


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_has_the_zeros_the_mask_and_the_trained_weights(runs, exported, task):
    mask, trained = Mask.load(exported[task] / "mask.safetensors"), read_tensors(runs[task] / "level_01" / "weights.safetensors")
    files = [exported[task] / name for name in ("model.safetensors", "pooler.safetensors")]
    weights = {name: tensor for file in files if file.exists() for name, tensor in read_tensors(file).items()}
    assert files[1].exists() == (task in ("squad", "mlm"))
    assert weights.keys() == trained.keys()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, trained[name]) for name, tensor in weights.items())
    assert mask.sparsity == pytest.approx(0.4, abs=1e-3)
    assert all((weights[name][~kept] == 0).all() for name, kept in mask.items())
    assert sum(int(weights[name].count_nonzero()) for name in mask) == mask.kept == line_of(runs[task], 1)["kept"]


@pytest.mark.parametrize(
    ("task", "architecture", "labels", "problem"),
    [
        ("rte", "BertForSequenceClassification", {"0": "entailment", "1": "not_entailment"}, "single_label_classification"),
        ("stsb", "BertForSequenceClassification", {"0": "LABEL_0"}, "regression"),
        ("squad", "BertForQuestionAnswering", None, None),
        ("mlm", "BertForMaskedLM", None, None),
    ],
)
def test_the_configuration_is_the_tasks(exported, task, architecture, labels, problem):
    config = json.loads((exported[task] / "config.json").read_text())
    assert (config["architectures"], config.get("id2label"), config.get("problem_type")) == ([architecture], labels, problem)
    assert config["dtype"] == "float32"
    tokenizer = json.loads((exported[task] / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & tokenizer.keys()  # where it was read from


def test_labels_are_named_as_on_the_hub_and_in_our_order(bert_dir):
    def named(task: str) -> list[str]:
        config = Glue(task).load_net(build("glue", {"task": task, "model": str(bert_dir)}))[0].config
        assert config.label2id == {name: number for number, name in config.id2label.items()}
        return [config.id2label[i] for i in range(config.num_labels)]

    assert named("mnli") == ["entailment", "neutral", "contradiction"]
    assert named("sst2") == ["negative", "positive"]
    assert named("cola") == ["unacceptable", "acceptable"]


# ---- the ticket itself ----


@pytest.mark.parametrize("task", TASKS)
def test_an_untrained_ticket_trained_gives_the_levels_bits(runs, tickets, commands, tmp_path, task):
    words = ["--model", tickets[task], "--mask", tickets[task] / "mask.safetensors"]
    again, level = line_of(run_task(task, commands, tmp_path, *words), 0), line_of(runs[task], 1)
    same = ("init_sha256", "mask_sha256", "losses", "metrics", "kept")
    assert {key: again[key] for key in same} == {key: level[key] for key in same}


@pytest.mark.parametrize("extra", [["--rewind", "3"], ["--init", "random"], ["--protocol", "released"]], ids=" ".join)
def test_the_ticket_is_what_the_level_started_from(commands, tmp_path, extra):
    run = run_task("rte", commands, tmp_path, "--levels", "3", *extra)
    export(run, tmp_path / "ticket", 2, untrained=True)
    found = read_tensors(tmp_path / "ticket" / "model.safetensors")
    assert sha256_of({n: t for n, t in found.items() if n.startswith("bert.")}) == line_of(run, 2)["init_sha256"]
    if extra[0] == "--rewind":
        assert torch.equal(found["classifier.weight"], read_tensors(run / "rewind.safetensors")["classifier.weight"])
    export(run, tmp_path / "dense", 0, untrained=True)
    dense = read_tensors(tmp_path / "dense" / "model.safetensors")
    assert sha256_of({n: t for n, t in dense.items() if n.startswith("bert.")}) == line_of(run, 0)["init_sha256"]


def refused(*words: object) -> str:
    """What the command says on the way out with exit code 2."""
    with pytest.raises(UserError) as refusal:
        main(parse([str(word) for word in words]))
    return str(refusal.value)


def test_without_rewinding_there_is_no_ticket_but_trained_weights(commands, tmp_path):
    run = run_task("rte", commands, tmp_path, "--levels", "2", "--rewind", "none")
    assert "with --rewind none a level goes on from the weights" in refused(run, tmp_path / "o", "--untrained")
    assert not (tmp_path / "o").exists()
    export(run, tmp_path / "trained")
    export(run, tmp_path / "dense", 0, untrained=True)


def test_a_ticket_of_other_weights_is_refused(copied, commands, bert_dir, tmp_path):
    run, output = copied("stsb"), tmp_path / "o"
    other = shutil.copytree(bert_dir, tmp_path / "other")
    weights = read_tensors(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 5] += 1
    (other / "model.safetensors").unlink()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for words in (["--untrained"], []):
        assert "other is not what" in refused(run, output, "--model", other, *words)
    config = json.loads((other / "config.json").read_text()) | {"hidden_act": "relu"}
    (other / "config.json").write_text(json.dumps(config))
    assert "the architecture differs" in refused(run, output, "--model", other)

    line = line_of(run, 1)
    write_checksummed(run / "level_01" / "metrics.json", line | {"init_sha256": "0" * 64})
    assert "started from other weights (init_sha256)" in refused(run, output, "--untrained")
    late = run_task("rte", commands, tmp_path, "--levels", "2", "--rewind", "3")
    (late / "rewind.safetensors").unlink()
    assert "rewind.safetensors is missing" in refused(late, output, "--untrained")
    assert not output.exists()


# ---- which level, which folder ----


def test_an_older_level_needs_its_model_kept(runs, tmp_path):
    said = refused(runs["stsb"], tmp_path / "o", "--level", "0")
    assert "has no trained weights" in said
    assert "--keep-models" in said
    export(runs["rte"], tmp_path / "kept", 0)
    kept = read_tensors(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(t, kept[n]) for n, t in read_tensors(runs["rte"] / "level_00/model/model.safetensors").items())
    assert Mask.load(tmp_path / "kept" / "mask.safetensors").kept == line_of(runs["rte"], 0)["total"]


def test_a_kept_model_needs_no_base_model(copied, bert_dir, tmp_path):
    run = copied("rte")
    about = read_checksummed(run / "run.json")
    about["config"]["model"] = about["differs_from_preset"]["model"] = str(tmp_path / "gone")
    write_checksummed(run / "run.json", about)
    export(run, tmp_path / "kept")
    shutil.rmtree(run / "level_01" / "model")
    said = refused(run, tmp_path / "o")
    assert "cannot be exported without the model it began with: no BERT checkpoint" in said
    export(run, tmp_path / "moved", model=str(bert_dir))
    assert (tmp_path / "moved" / "model.safetensors").read_bytes() == (tmp_path / "kept" / "model.safetensors").read_bytes()


def test_a_base_model_that_was_named_from_another_folder_is_found(copied, bert_dir, tmp_path, monkeypatch):
    run = copied("stsb")
    about = read_checksummed(run / "run.json")
    about["config"]["model"] = "models/theta0"
    write_checksummed(run / "run.json", about)
    monkeypatch.chdir(tmp_path)
    export(run, Path("o"), untrained=True)
    assert "a BERT kept in a folder called `theta0`" in Path("o/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([".", "o"], ". is no run directory: it has no run.json"),
        (["RUN", "o", "--level", "7"], "has no finished level 7; it has 0, 1"),
        (["RUN", "o", "--level", "-1"], "has no finished level -1"),
        (["RUN", "full"], "full is not empty"),
        (["RUN", "full/file"], "full/file is a file"),
        (["RUN", "/proc/nowhere/o"], "cannot write /proc/nowhere/o"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_sentence_and_exit_code_2(runs, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(SystemExit) as end:
        run_command(main, parse([str(runs["stsb"]) if word == "RUN" else word for word in words]))
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert Path("full/file").read_text() == "mine"


def test_a_run_without_a_level_or_of_the_future_is_refused(copied, tmp_path):
    run = copied("stsb")
    about = read_checksummed(run / "run.json")
    write_checksummed(run / "run.json", about | {"config": about["config"] | {"later": 1}})
    assert "does not know the setting later" in refused(run, tmp_path / "o")
    write_checksummed(run / "run.json", about | {"format": 99})
    assert "has format 99" in refused(run, tmp_path / "o")
    write_checksummed(run / "run.json", {"format": 1})
    assert "run.json is damaged" in refused(run, tmp_path / "o")
    write_checksummed(run / "run.json", about)
    for level in run.glob("level_*"):
        shutil.rmtree(level)
    assert "has no finished level yet" in refused(run, tmp_path / "o")


def test_a_damaged_level_is_refused_and_leaves_nothing(copied, tmp_path):
    run, output = copied("stsb"), tmp_path / "out" / "o"
    level = run / "level_01"
    mask, weights = (level / "mask.safetensors").read_bytes(), read_tensors(level / "weights.safetensors")
    facts = read_facts(level / "weights.safetensors")
    (level / "mask.safetensors").write_bytes(mask[:-1] + bytes([mask[-1] ^ 1]))
    assert "its content does not match its checksum" in refused(run, output)
    shutil.copy(run / "level_00" / "mask.safetensors", level / "mask.safetensors")  # a sound mask, but not this level's
    for words in ([], ["--untrained"]):
        assert "its mask is not the one that its metrics.json names" in refused(run, output, *words)
    (level / "mask.safetensors").write_bytes(mask)
    own = Mask.load(level / "mask.safetensors")
    own.write(level / "mask.safetensors", **own.info | {"run": "another"})
    assert "is damaged or another run's: it is of another" in refused(run, output)
    (level / "mask.safetensors").write_bytes(mask)
    line = line_of(run, 1)
    write_checksummed(level / "metrics.json", line | {"kept": line["kept"] + 1})
    assert "its mask keeps" in refused(run, output)
    write_checksummed(level / "metrics.json", line)

    name, kept = next((name, kept) for name, kept in Mask.load(level / "mask.safetensors").items() if not kept.all())
    place = tuple((~kept).nonzero()[0])
    weights[name][place] = 1e-3
    write_tensors(level / "weights.safetensors", weights, facts)
    assert "1 weights that its mask removes are not zero" in refused(run, output)
    weights[name][place] = 0
    write_tensors(level / "weights.safetensors", {n: t for n, t in weights.items() if n != "classifier.bias"}, facts)
    assert "has no classifier.bias of shape (1,)" in refused(run, output)
    write_tensors(level / "weights.safetensors", weights, facts | {"run": "another"})
    assert "weights.safetensors is damaged or another run's" in refused(run, output)
    (level / "weights.safetensors").write_bytes(b"torn")
    assert "is damaged or missing" in refused(run, output)
    assert not output.exists()
    assert list(output.parent.glob("*")) == list(output.parent.glob(".*")) == []


@pytest.mark.parametrize("name", ["model.safetensors", "pooler.safetensors", "config.json", "tokenizer.json"])
def test_a_kept_model_that_is_not_what_the_run_wrote_is_refused(copied, tmp_path, name):
    run = copied("squad")
    file, output = run / "level_00" / "model" / name, tmp_path / "o"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"0", b"1", 1) if name.endswith("json") else data[:-1] + bytes([data[-1] ^ 1]))
    assert f"{name} is damaged: it is not what the level's metrics.json noted" in refused(run, output, "--level", "0")
    file.unlink()
    assert f"{name} is damaged or missing" in refused(run, output, "--level", "0")


def test_nothing_of_the_run_is_changed(runs, tmp_path):
    def stamps() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in runs["squad"].rglob("*")}

    before = stamps()
    export(runs["squad"], tmp_path / "o")
    assert stamps() == before


# ---- whole or not there ----


def test_a_kill_leaves_a_whole_folder_or_none(runs, tmp_path, monkeypatch):
    """Before and after every flush and the rename, with nothing tidied up, as SIGKILL does; into an empty folder too."""
    ticket = find(runs["squad"])
    net, tokenizer = bert_tickets.export.export.load_trained(ticket)
    (tmp_path / "undisturbed").mkdir()
    write = bert_tickets.export.export.write_ticket
    write(tmp_path / "undisturbed" / "o", ticket, net, tokenizer, untrained=False)
    expected, deaths = contents(tmp_path / "undisturbed" / "o"), 0
    output = tmp_path / "killed" / "o"
    for target, name in [(os, "fsync"), (Path, "rename")]:
        for before in (True, False):
            at, done = 1, False
            while not done:
                shutil.rmtree(output.parent, ignore_errors=True)
                output.mkdir(parents=True)
                with monkeypatch.context() as patch:
                    patch.setattr(target, name, dying(getattr(target, name), at, before=before))
                    patch.setattr(bert_tickets.files.shutil, "rmtree", lambda *_, **__: None)
                    try:
                        write(output, ticket, net, tokenizer, untrained=False)
                        done = True
                    except Killed:
                        deaths += 1
                assert contents(output) in ({}, expected)
                if not contents(output):
                    write(output, ticket, net, tokenizer, untrained=False)
                assert contents(output) == expected
                assert [path.name for path in output.parent.iterdir()] == ["o"]
                at += 1
    assert deaths > 20


def test_every_file_is_on_the_disk_before_the_folder_appears(runs, tmp_path, monkeypatch):
    flushed, rename, fsync, found = {}, Path.rename, os.fsync, {}

    def note(descriptor: int) -> None:
        about = os.fstat(descriptor)
        flushed[about.st_ino] = set(os.listdir(descriptor)) if stat.S_ISDIR(about.st_mode) else about.st_size
        fsync(descriptor)

    def look(path: Path, target: Path) -> Path:
        found["."] = flushed.get(path.stat().st_ino) == {entry.name for entry in path.iterdir()}
        found.update({entry.name: flushed.get(entry.stat().st_ino) == entry.stat().st_size for entry in path.iterdir()})
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", look)
    export(runs["squad"], tmp_path / "o")
    assert found.keys() == contents(tmp_path / "o").keys() | {"."}
    assert all(found.values())


def test_what_a_killed_export_left_is_in_no_other(runs, exported, tmp_path):
    (tmp_path / ".stsb.tmp").mkdir()
    (tmp_path / ".stsb.tmp" / "pooler.safetensors").write_bytes(b"of SQuAD")
    export(runs["stsb"], tmp_path / "stsb")
    assert contents(tmp_path / "stsb") == contents(exported["stsb"])
    assert [path.name for path in tmp_path.iterdir()] == ["stsb"]


def test_an_error_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mask, "to_bytes", full)
    assert "the disk is full" in refused(runs["stsb"], tmp_path / "a" / "o")
    assert list((tmp_path / "a").iterdir()) == []


def test_two_at_once_are_one_and_a_refusal(tmp_path):
    with bert_tickets.files.writing_folder(tmp_path / "o") as first:
        (first / "file").write_text("one")
        with pytest.raises(UserError, match="is in use by"), bert_tickets.files.writing_folder(tmp_path / "o"):
            pytest.fail("two hold the folder")
    assert contents(tmp_path / "o") == {"file": b"one"}


# ---- the folder as a base model ----


@pytest.mark.parametrize("base", TASKS)
@pytest.mark.parametrize("task", ["rte", "stsb", "mnli", "squad", "mlm"])
def test_an_exported_folder_is_a_base_model_of_every_task(exported, capsys, base, task):
    adapter = {"squad": Squad, "mlm": Mlm}.get(task, lambda: Glue(task))()
    net, _ = adapter.load_net(build(preset_of(task), {"task": task, "model": str(exported[base])}))
    assert "no pooler" not in capsys.readouterr().out  # the ticket's own is found
    files = [exported[base] / name for name in ("model.safetensors", "pooler.safetensors")]
    stored = {name: tensor for file in files if file.exists() for name, tensor in read_tensors(file).items()}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder_weights(net).items())
    assert net.config.num_labels == {"stsb": 1, "mnli": 3}.get(task, 2)
    if task in ("squad", "mlm"):
        assert (net.config.problem_type, net.config.id2label) == (None, {0: "LABEL_0", 1: "LABEL_1"})


def test_a_run_on_an_exported_folder_can_be_exported(exported, commands, tmp_path):
    run = run_task("stsb", commands, tmp_path, "--model", exported["rte"], "--levels", "1")
    export(run, tmp_path / "o")
    assert "LABEL_0" in json.loads((tmp_path / "o" / "config.json").read_text())["label2id"]


# ---- the card ----


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_card_says_what_the_run_knows(runs, exported, tickets, task, untrained):
    text = ((tickets if untrained else exported)[task] / "README.md").read_text()
    line, about = line_of(runs[task], 1), json.loads((runs[task] / "run.json").read_text())
    for value in (
        f"{line['kept']:,} of {line['total']:,} weights kept",
        *(f"{name}{' once trained (not of these weights)' * untrained} | {v:.6g} |" for name, v in line["metrics"].items()),
        line["mask_sha256"],
        line["init_sha256"],
        about["fingerprint"]["model"],
        "| seed | 57 |",
        "| lr | `0.001` |",
        "| rate | `0.4` |",
        "level 1 of 2",
        "the original weights",
        f"torch {version('torch')}",
        "2007.12223",
    ):
        assert value in text
    assert ("| doc_stride |" in text) == (task == "squad")
    assert ("Level 1 group theta_0 itself" in text) == (task == "mlm")
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers"
    assert {"lottery-ticket", "pruning"} <= set(data["tags"])
    assert ("pipeline_tag" in data) == ("metrics" in data) == (not untrained)
    assert not {"base_model", "datasets", "model-index", "license"} & data.keys()  # of a folder's the hub knows nothing


def as_from_the_hub(run: Path, **config: object):
    """The ticket as if model and data had come from the hub."""
    ticket = find(run)
    differs = {key: value for key, value in ticket.about["differs_from_preset"].items() if key not in ("model", "data_dir")}
    cfg = replace(ticket.cfg, model="bert-base-uncased", data_dir=None, **config)
    return replace(ticket, about={**ticket.about, "differs_from_preset": differs}, cfg=cfg)


@pytest.mark.parametrize(
    ("task", "data", "config", "metrics"),
    [
        ("rte", "nyu-mll/glue", "rte", ["accuracy"]),
        ("stsb", "nyu-mll/glue", "stsb", ["pearsonr", "spearmanr"]),
        ("squad", "rajpurkar/squad", None, ["exact_match", "f1"]),
        ("mlm", "Salesforce/wikitext", "wikitext-103-raw-v1", ["accuracy", "perplexity"]),
    ],
)
def test_what_the_hub_reads(runs, task, data, config, metrics):
    ticket = as_from_the_hub(runs[task], limit_eval=None)
    found = ModelCard(card(ticket, "o", untrained=False)).data
    assert (found.base_model, found.datasets, found.metrics) == ("bert-base-uncased", [data], metrics)
    results = {result.metric_type: result for result in found.eval_results}
    assert sorted(results) == metrics
    for result in results.values():
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == (data, config, "validation")
        assert result.metric_value == ticket.line["metrics"][result.metric_name]
    for other in (front_matter(as_from_the_hub(runs[task], limit_eval=9), untrained=False), front_matter(ticket, untrained=True)):
        assert "model-index" not in other  # a part of the evaluation set; weights that no value is of
        assert "base_model: bert-base-uncased" in other


def test_the_mismatched_set_and_undefined_values(runs):
    ticket = as_from_the_hub(runs["rte"])
    sets = {name: {"examples": 9, "sha256": "0" * 64} for name in ("validation_matched", "validation_mismatched")}
    about = {**ticket.about, "fingerprint": {**ticket.about["fingerprint"], "evaluation": sets}}
    line = {**ticket.line, "metrics": {"accuracy": None, "accuracy_mm": 0.75}}
    mnli = replace(ticket, about=about, line=line, cfg=replace(ticket.cfg, task="mnli"))
    text = card(mnli, "o", untrained=False)
    assert "| accuracy | undefined |" in text
    assert "0 entailment, 1 neutral, 2 contradiction" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_split) == ("accuracy_mm", 0.75, "validation_mismatched")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "geometric"}, "10 % of what is left"),
        ({"scope": "tensor"}, "ranked over each matrix by itself"),
        ({"rewind": "5%"}, "what they were after 5% of level 0's training"),
        ({"rewind": "500"}, "what they were after 500 steps of level 0's training"),
        ({"rewind": "none"}, "goes on from those kept as they are (no rewinding) and trains again"),
        ({"init": "random"}, "random weights drawn by the seed (theta_0)"),
        ({"rewind_head": False}, "but the head goes on"),
        ({"protocol": "released"}, "`--protocol released`"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_method_is_told(runs, settings, said):
    ticket = find(runs["rte"])
    assert said in card(replace(ticket, cfg=replace(ticket.cfg, rate=0.1, **settings)), "o", untrained=False)


def test_a_given_masks_origin_is_told_and_no_path_of_this_machine(commands, bert_dir, tmp_path):
    run_dir = run_task("rte", commands, tmp_path, "--levels", "2", "--rate", "0.4")
    run = run_task("squad", commands, tmp_path, "--mask", run_dir / "level_01" / "mask.safetensors")
    export(run, tmp_path / "o")
    text = (tmp_path / "o" / "README.md").read_text()
    assert "The mask was given" in text
    assert f"base_model {bert_dir.name}, level 1, method imp, run {run_dir.name}, seed 57, task rte" in text
    assert "| mask | `sha256:" in text
    assert not {"| rate |", "| levels |"} & set(re.findall(r"\| \w+ \|", text))
    for name, content in contents(tmp_path / "o").items():
        for place in (tmp_path, bert_dir.parent):
            assert str(place).encode() not in content, name
    assert Mask.load(tmp_path / "o" / "mask.safetensors").info["base_model"] == bert_dir.name


@pytest.mark.parametrize("task", TASKS)
def test_the_cards_examples_work(exported, tickets, monkeypatch, task):
    for folder in (exported[task], tickets[task]):
        monkeypatch.chdir(folder.parent)
        text = (folder / "README.md").read_text()
        names: dict = {}
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(code, names)
        assert names["mask"] == Mask.load(folder / "mask.safetensors")
        if task in ("squad", "mlm"):  # by the code, transformers has the pooler too
            stored = read_tensors(folder / "pooler.safetensors")
            assert all(torch.equal(t, stored[f"bert.pooler.{n}"]) for n, t in names["model"].pooler.named_parameters())
        else:
            assert names["outputs"].logits.shape == (1, 1 if task == "stsb" else 2)
        lines = [line.partition("#")[0].split()[1:] for line in text.splitlines() if line.startswith("python lt_")]
        assert len(lines) == 3
        for script, *words in lines:
            assert parse_script(SCRIPTS[script][1], None, words).mask == f"{task}/mask.safetensors"


# ---- the command ----


def test_the_command_writes_the_folder_and_says_how_to_open_it(runs, exported, tmp_path):
    words = [str(runs["rte"]), "--level", "1", str(tmp_path / "rte")]
    ran = subprocess.run(
        [sys.executable, "-m", "bert_tickets.export.export", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "rte") == contents(exported["rte"])
    line = line_of(runs["rte"], 1)
    assert f"{line['kept']:,} of {line['total']:,} weights kept, 40.0% removed" in ran.stdout
    assert "model.safetensors" in ran.stdout
    assert f"AutoModelForSequenceClassification.from_pretrained('{tmp_path}/rte')" in ran.stdout


def test_help_answers_at_once_and_imports_nothing_heavy():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bert_tickets.export.export", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0
    assert "usage: python -m bert_tickets.export.export" in ran.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "numpy", "transformers", "safetensors", "huggingface_hub"})


def test_the_examples_are_accepted():
    """Of the help and the README."""
    texts = (bert_tickets.export.export.__doc__, (ROOT / "README.md").read_text(encoding="utf-8"))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    examples = [line.partition("#")[0].split()[3:] for line in lines if line.startswith("python -m bert_tickets.export.export ")]
    assert len(examples) >= 2
    for words in examples:
        assert parse(words).run.startswith("runs/")


@pytest.mark.parametrize("given", [{"task": "mnli", "rewind": "5%", "lr": 1e-4, "mask": None}, {"task": "squad", "max_steps": 7}])
def test_a_configuration_comes_back_from_its_flat_form(given):
    cfg = build(preset_of(given["task"]), given)
    assert of_flat(json.loads(json.dumps(flat(cfg)))) == cfg


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="does not know the task nli"):
        preset_of("nli")


def test_a_kept_model_of_an_earlier_level_is_exported_with_its_pooler(runs, tmp_path, capsys):
    """The plain class has no pooler, so that it lies beside the kept model."""
    from bert_tickets.modeling.loading import load_bert

    kept = runs["squad"] / "level_00" / "model"
    assert {path.name for path in kept.iterdir()} >= {"model.safetensors", "pooler.safetensors"}
    assert len({path.stat().st_mode for path in kept.iterdir()}) == 1, "who may read one file may read all"
    export(runs["squad"], tmp_path / "o", 0)
    for place in (kept, tmp_path / "o"):
        net, _ = load_bert(str(place), "qa", "pretrained", 57)
        pooler = read_tensors(kept / "pooler.safetensors")
        assert all(torch.equal(net.get_parameter(name), tensor) for name, tensor in pooler.items())
    assert "drawn at random" not in capsys.readouterr().out
