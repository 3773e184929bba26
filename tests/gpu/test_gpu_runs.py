"""Runs of the training scripts on a GPU, fake or real (`-m cuda`), in which devices never mix and no step waits."""

import contextlib
import importlib
import json

import fake_cuda
import numpy as np
import pytest
import torch
from fake_cuda import only_fake, sync_debug
from trainrun import Killed, dying, of_sst2, same, train

from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.methods.oneshot import oneshot
from bert_tickets.modeling.loading import load_bert
from bert_tickets.runs.directory import level_dir, results
from bert_tickets.tasks import glue
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import Squad
from bert_tickets.training.coefficients import Record
from bert_tickets.training.cuda_graphs import Graphs
from bert_tickets.training.step import Step

GLUE, SQUAD, MLM = "lt_glue.py", "lt_squad.py", "lt_pretrain.py"


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def never_wait(monkeypatch):
    """Raise if a training step, its batch, or an evaluation batch waits for the GPU. Verifying a captured step may wait."""

    def wrap(owner, name, mode):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with sync_debug(mode):
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Step, "__call__"), (Batches, "parts"), (Glue, "predict"), (Squad, "predict"), (Mlm, "predict")):
        wrap(owner, name, "error")
    wrap(Graphs, "_capture", "default")


@pytest.fixture
def run(commands, tmp_path, one_gpu):
    """Run a training script in a folder of the test, on the GPU or the CPU; returns its results and its newest weights."""

    def go(script, words="", folder="here", device="auto"):
        levels = "" if "--mask" in words else "--levels 2"
        short = "--max-length 40" if script == GLUE else ""
        words = f"--max-steps 4 {levels} {short} --device {device} --output-dir {tmp_path / folder} {words}"
        with contextlib.nullcontext() if device == "cpu" else one_gpu():
            path = train(script, [*commands[script], *words.split()])
        found = results(path)
        return found, (level_dir(path, len(found) - 1) / "weights.safetensors").read_bytes()

    return go


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (SQUAD, "--precision fp16"),
        (GLUE, "--precision bf16 --rewind none --weight-decay 0.01"),
        (GLUE, "--precision fp32 --tf32 --rewind 2 --scope tensor --init random --prunable matrices+biases --grad-accum 2"),
        (MLM, "--precision fp16 --protocol released --prunable matrices+embeddings"),
    ],
)
def test_whole_run_mixes_no_devices_and_no_step_waits(run, tmp_path, script, words):
    found, _ = run(script, words)
    assert [line["level"] for line in found] == [0, 1]
    assert found[1]["sparsity"] == pytest.approx(0.1, abs=1e-3)
    assert all(np.isfinite(loss) for line in found for _, loss in line["losses"])
    (path,) = tmp_path.rglob("run.json")
    about = json.loads(path.read_text())
    assert about["fingerprint"]["device"] == "cuda"
    assert about["fingerprint"]["precision"] == words.split()[1]
    assert about["environment"]["gpu"]


@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
def test_a_mask_is_trained_and_scored(commands, documents_dir, tmp_path, one_gpu, objective):
    """In fp16; a real GPU replays the third step as a CUDA graph, in which the thresholds of the refresh before it hold."""
    words = (
        f"--method mask-training --sparsity 0.5 --objective {objective} --refresh 2 --save-masks 2 --max-steps 6 --precision fp16"
    )
    with one_gpu():
        path = train(MLM, [*commands[MLM], *words.split(), "--data-dir", documents_dir, "--output-dir", tmp_path])
        (line,) = results(path)
        scored = train(MLM, [*_without_training(commands[MLM]), "--score", "--mask", level_dir(path, 0) / "mask.safetensors",
                             "--output-dir", tmp_path])  # fmt: skip
    assert line["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert [record["step"] for record in line["refreshes"]] == [2, 4, 6]
    assert all(np.isfinite(loss) for _, loss in line["losses"])
    assert results(scored)[0]["hidden_states"]["cosine"] > 0


@pytest.mark.parametrize(
    ("script", "words", "killed"),
    [
        (GLUE, "--draw-at 3 --precision fp16", 3),
        (SQUAD, "--draw-at 3 --keep-gates --precision fp16", 8),
        (MLM, "--draw-at 3 --graphs on --precision fp16", 8),
        (MLM, "--draw-when stable --draw-every 1 --search-lr 1e-6 --graphs on --precision fp32", 3),
    ],
)
def test_units_are_drawn_and_their_ticket_trained_killed_and_resumed(
    commands, tmp_path, one_gpu, monkeypatch, script, words, killed
):
    """A step's coefficients are recorded without waiting for the GPU; MLM's steps are replayed, and eager after the kill."""
    record = Record.__call__

    def recorded(*arguments):
        with sync_debug("error"):
            record(*arguments)

    monkeypatch.setattr(Record, "__call__", recorded)
    given = [*commands[script], "--method", "early-bird", *words.split(), "--save-steps", "1"]
    with one_gpu():
        whole = train(script, [*given, "--output-dir", tmp_path / "whole"])
        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", dying(Step.__call__, killed))
            with pytest.raises(Killed):
                train(script, [*given, "--output-dir", tmp_path / "killed"])
        assert same(train(script, [*given, "--output-dir", tmp_path / "killed"]), whole)
    search, training = results(whole)
    rows = np.load(level_dir(whole, 0) / "coefficients.npy")
    assert len(rows) == search["steps"] >= 3
    assert np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert (training["removed"]["heads"], search["init_sha256"]) == (2, training["init_sha256"])


def _without_training(words):
    """A script's words without the flags of training."""
    return [word for at, word in enumerate(words) if not {word, words[at - 1]} & {"--max-steps", "--lr"}]


@pytest.mark.parametrize(("method", "words"), [("importance", "--accumulate reference"), ("guarded_magnitude", "")])
def test_a_guarded_search_is_killed_and_resumed_and_its_ticket_scored(commands, tmp_path, one_gpu, monkeypatch, method, words):
    module = importlib.import_module(f"bert_tickets.methods.{method}")
    given = [*of_sst2(commands, "--method", method, "--threshold", "0", "--output-dir", tmp_path), *words.split()]
    with one_gpu():
        with monkeypatch.context() as patch:
            patch.setattr(module, "measure", dying(module.measure, 3))
            with pytest.raises(Killed):
                train(GLUE, given)
        run = train(GLUE, given)
        found = [level_dir(run, level) / name for level, name in ((0, "weights.safetensors"), (1, "mask.safetensors"))]
        score = [
            "--score",
            "--weights",
            found[0],
            "--mask",
            found[1],
            "--execution",
            "slim" if method == "importance" else "masked",
        ]
        scored = train(GLUE, of_sst2(commands, *score, "--output-dir", tmp_path))
    assert all(line["accepted"] for line in results(run)[1]["passes"])
    assert results(scored)[0]["metrics"] == results(run)[1]["metrics"]


def test_a_mask_from_a_file_is_trained(run, bert_dir, tmp_path):
    mask = oneshot(load_bert(str(bert_dir), "classifier", "pretrained", 0)[0], 0.5, "magnitude", 0)
    mask.write(tmp_path / "m.safetensors")
    ((line,), _) = run(GLUE, f"--mask {tmp_path}/m.safetensors")
    assert (line["sparsity"], line["mask_sha256"]) == (0.5, mask.sha256())


@pytest.mark.parametrize(
    ("script", "words", "call"),  # the third step is in level 0, the sixth in level 1
    [
        (SQUAD, "", 6),
        (MLM, "--graphs on", 3),
        (MLM, "--graphs on --eval-steps 1", 4),
        (GLUE, "--precision fp32 --grad-accum 2 --rewind none", 6),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(run, monkeypatch, script, words, call):
    """MLM's batches are of one bucket: steps that the whole run replays as CUDA graphs are eager after the kill."""
    whole = run(script, words, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying(Step.__call__, call))
        with pytest.raises(Killed):
            run(script, f"{words} --save-steps 1", "killed")
    assert run(script, f"{words} --save-steps 1", "killed") == whole


@pytest.mark.parametrize("script", [GLUE, MLM])
def test_evaluations_between_steps_change_no_step(run, script):
    """Also between the replays of CUDA graphs."""
    (plain, _), (found, _) = run(script, "--graphs on", "plain"), run(script, "--graphs on --eval-steps 1", "evaluated")
    for before, after in zip(plain, found, strict=True):
        assert [evaluation["step"] for evaluation in after["evaluations"]] == [1, 2, 3, 4]
        assert {key: after[key] for key in before if key != "run"} == {key: before[key] for key in before if key != "run"}


@only_fake
def test_more_steps_do_not_wait_more_often(run):
    waits = []
    for steps in (4, 12):
        fake_cuda.synchronizations.clear()
        run(GLUE, f"--graphs off --levels 1 --max-steps {steps} --log-every 100", f"{steps}")
        waits.append(len(fake_cuda.synchronizations))
    assert waits[0] == waits[1]


def test_a_run_without_dropout_computes_the_same_on_either_device(run, calm_bert_dir):
    words = f"--model {calm_bert_dir} --precision fp32"
    (on_gpu, _), (on_cpu, _) = (run(GLUE, words, device, device) for device in ("cuda", "cpu"))
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-3)
        assert a["kept"] == b["kept"]
    assert on_gpu[0]["init_sha256"] == on_cpu[0]["init_sha256"]


FAULTS = {  # a function, what the fault does with its result, and the error
    "a step waits": (Glue, "loss", lambda loss: loss * float(loss.detach() > 0), "synchronizing"),
    "a batch waits": (TokenStore, "batch", lambda batch: batch.lens.cpu() is None or batch, "synchronizing"),
    "a prediction waits": (glue, "classify", lambda logits: logits if logits.requires_grad else logits.cpu(), "synchronizing"),
    "a nondeterministic sum": (Glue, "loss", lambda loss: loss.reshape(1).cumsum(0)[0], "deterministic implementation"),
}


@only_fake
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(run, monkeypatch, fault):
    owner, name, change, message = FAULTS[fault]
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(function(*args, **kwargs)))
    with pytest.raises(RuntimeError, match=message):
        run(GLUE)
