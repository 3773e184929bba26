"""scripts/bench.py: what it measures, and that its sides train the same."""

import contextlib
import copy
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from conftest import ROOT
from transformers import AutoTokenizer, BertForSequenceClassification

from bert_tickets.bench import baselines, measure
from bert_tickets.bench.tiny_bert import save_bert
from bert_tickets.modeling.loading import load_bert


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """Run the script in this process, on two small steps; returns its JSON."""

    def run(*words):
        small = ["--batch-size", "4", "--max-length", "48", "--turns", "1", "--turn-steps", "2"]
        monkeypatch.setattr("sys.argv", ["bench.py", *small, *map(str, words), "--json", str(tmp_path / "bench.json")])
        bench.main(bench.parse())
        return json.loads((tmp_path / "bench.json").read_text())

    return run


@pytest.mark.parametrize("source", ["data", "random"])
def test_both_sides_are_measured_on_the_same_examples(run_bench, bert_dir, glue_dir, monkeypatch, capsys, source):
    monkeypatch.setattr(measure, "gemm_rate", lambda precision, device: 1e11)  # seconds on a busy machine
    words = ["rte", "--data-dir", glue_dir] if source == "data" else ["sst2", "mlm"]
    found = run_bench("--model", bert_dir, "--tasks", *words)
    assert "eager over released, times" in capsys.readouterr().out
    assert found["machine"]["versions"]["torch"]
    assert {"gpu", "cuda", "cores"} <= found["machine"].keys()
    for task in found["figures"].values():
        assert 4 * 3 <= task["real tokens a step"] <= task["padded tokens a step"] == 4 * 48
        assert task["eager over released, times"] == pytest.approx(task["eager: steps/s"] / task["released: steps/s"])
        assert task["eager: % of the machine's rate"] > 0


def test_a_step_is_profiled_by_operator(run_bench, bert_dir):
    assert "aten::addmm" in run_bench("--model", bert_dir, "--tasks", "rte", "--profile")["figures"]["rte"]


def test_kernels_are_read_from_torchs_profiler(monkeypatch):
    """Only those on the GPU, without copies."""

    def event(name, kind, microseconds):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda: microseconds))

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("fmha_cutlassF", gpu, 30), event("gemm", gpu, 50), event("gemm", gpu, 50), event("cudaLaunchKernel", cpu, 9)]
    events += [event("Memcpy HtoD", gpu, 7), event("Memset (Device)", gpu, 7)]
    profiled = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities, acc_events: profiled)
    count, seconds = measure.profile_kernels(lambda i: None, 2, torch.device("cpu"))
    assert count == 1.5
    assert seconds == pytest.approx({"fmha_cutlassF": 15e-6, "gemm": 50e-6})
    assert measure.short_name("void at::native::(anonymous namespace)::gemm<c10::Half, 4>(int)") == "gemm<Half, 4>(int)"


@pytest.mark.parametrize("words", ["--turns 0", "--sparsity nan", f"--max-length {10**20}"])
def test_numbers_out_of_range_are_refused(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["bench.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        bench.parse()
    assert stop.value.code == 2
    assert f"error: {words}: " in capsys.readouterr().err


def test_a_random_checkpoint_can_be_loaded(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 200}
    save_bert(tmp_path, **sizes)
    net, tokenizer = load_bert(str(tmp_path), "classifier", "pretrained", 0)
    assert net.config.vocab_size == len(tokenizer) == 200


# ---- the sides train the same ----


def hugging_face_loop(case, steps):
    """Losses and weights of a plain padded loop with transformers and torch.nn.utils.prune, on one batch of all of SST-2."""
    lines = (Path(case.cfg.data_dir) / "SST-2" / "train.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(case.cfg.model)
    inputs = tokenizer(list(texts), padding="max_length", truncation=True, max_length=48, return_tensors="pt")
    labels = torch.tensor([int(label) for label in labels])
    net = BertForSequenceClassification(copy.deepcopy(case.net.config)).train()
    net.load_state_dict(case.net.state_dict())
    for name, kept in case.mask.items():
        torch_prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", kept)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=case.cfg.train.lr, eps=1e-8, weight_decay=0), []
    for _ in range(steps):
        loss = F.cross_entropy(net(**inputs).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), case.cfg.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    masks = {f"{name}_orig": kept for name, kept in case.mask.items()}
    return losses, {name.removesuffix("_orig"): p * masks.get(name, 1) for name, p in net.named_parameters()}


def test_the_released_side_and_ours_equal_a_padded_hugging_face_loop(calm_bert_dir, glue_dir):
    given = {"model": str(calm_bert_dir), "data_dir": str(glue_dir), "batch_size": 44, "max_length": 48}
    case = baselines.make_case("sst2", given | {"lr": 1e-3, "limit_train": 44}, sparsity=0.5)
    losses, weights = hugging_face_loop(case, 3)
    released = baselines.released(case)
    assert [released(i) for i in range(3)] == pytest.approx(losses, abs=1e-5)
    step, ours = baselines.packed_step(case)
    assert [ours(i).item() for i in range(3)] == pytest.approx(losses, abs=1e-5)
    for name, p in step.params.items():
        torch.testing.assert_close(p, weights[name], rtol=0, atol=2e-4, msg=name)


# ---- gpu_check.sh ----

PYTHON = """#!/bin/sh
case "$1 $2 $3" in
  *is_available*) exit $NO_GPU ;;
  *"import pytest"*) exit $NO_PYTEST ;;
esac
echo "$@" >> "$CALLS"
case "$*" in *pytest*) echo 3 passed; exit $FAILED ;; esac
"""


@pytest.mark.parametrize(
    ("given", "words", "code", "said"),
    [
        ({}, "", 0, "3 passed"),
        ({}, "--quick", 0, "3 passed"),
        ({"FAILED": "1"}, "", 1, "3 passed"),
        ({"NO_GPU": "1"}, "", 2, "torch sees no GPU"),
        ({"NO_PYTEST": "1"}, "", 2, "pip install -e"),
        ({"MINUTES": "0"}, "", 1, "no time left for"),
        ({}, "--slow", 2, "unknown arguments: --slow"),
    ],
)
def test_gpu_check_runs_the_gpu_tests_and_the_benchmark(tmp_path, given, words, code, said):
    """With a stand-in for the interpreter. After a failed test the benchmark runs, and the exit code is 1."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "CALLS": str(calls), "NO_GPU": "0", "NO_PYTEST": "0", "FAILED": "0"} | given
    command = ["bash", ROOT / "scripts" / "gpu_check.sh", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    if "passed" not in said:
        assert not calls.exists()
        return
    tests, benchmark = calls.read_text().splitlines()
    assert "-m pytest -m cuda" in tests
    assert ("-k" in tests) == (words == "--quick")
    assert f"--model random --tasks mnli --turns {2 if words else 5}" in benchmark
    assert (tmp_path / "runs" / "gpu_check" / "tests.log").read_text() == "3 passed\n"
