"""scripts/bench.py: what it prints, and that its sides train the same."""

import contextlib
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from transformers import AutoTokenizer, BertForSequenceClassification

from bert_tickets.bench import baselines, measure
from bert_tickets.bench.levers import LEVERS
from bert_tickets.bench.timing import profile_kernels, short_name


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """Run the script in this process; returns the figures by column."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["bench.py", *map(str, words), "--json", str(tmp_path / "bench.json")])
        bench.main(bench.parse())
        return json.loads((tmp_path / "bench.json").read_text())["figures"]

    return run


SMALL = ["--batch-size", "4", "--max-length", "48", "--turns", "1", "--turn-steps", "2"]


@pytest.mark.parametrize("source", ["data", "random"])
def test_both_sides_are_measured_on_the_same_examples(run_bench, bert_dir, glue_dir, monkeypatch, capsys, source):
    monkeypatch.setattr(measure, "gemm_rate", lambda precision, device: 1e11)  # seconds on a busy machine
    words = ["rte", "--data-dir", glue_dir] if source == "data" else ["sst2", "mlm"]
    found = run_bench("--model", bert_dir, *SMALL, "--tasks", *words)
    assert "eager over released, times" in capsys.readouterr().out
    for task in found.values():
        assert 4 * 3 <= task["real tokens a step"] <= task["padded tokens a step"] == 4 * 48
        assert task["eager over released, times"] == pytest.approx(task["eager: steps/s"] / task["released: steps/s"])
        assert task["eager: % of the machine's rate"] > 0


@pytest.mark.cuda
def test_on_a_gpu_three_sides_are_measured_with_their_kernels(run_bench, bert_dir):
    found = run_bench("--model", bert_dir, *SMALL, "--tasks", "mnli")["mnli"]
    for side in ("eager", "graphs", "released"):
        for figure in ("steps/s", "padded tokens/s", "kernels a step", "GPU busy, %", "memory reserved, MiB"):
            assert found[f"{side}: {figure}"] > 0
    profiled = run_bench("--model", bert_dir, *SMALL, "--tasks", "mnli", "--profile")["mnli"]
    assert any("FusedOptimizer" in kernel for kernel in profiled)


def test_one_side_is_measured_alone(run_bench, bert_dir):
    found = run_bench("--model", bert_dir, *SMALL, "--tasks", "mlm", "--alone", "released")["mlm"]
    assert found["released: a step, ms"] > 0
    assert found["released: peak memory, MiB"] > 100


def test_a_levels_costs_are_measured(run_bench, bert_dir):
    found = run_bench("--level", "--model", bert_dir)["level"]
    assert found["mask file, MB"] > 0
    assert found["together, s"] >= found["choose the mask, s"] > 0


def test_kernels_are_read_from_torchs_profiler(monkeypatch):
    """Only those on the GPU, without copies."""

    def event(name, kind, microseconds):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda: microseconds))

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("fmha_cutlassF", gpu, 30), event("gemm", gpu, 50), event("gemm", gpu, 50), event("cudaLaunchKernel", cpu, 9)]
    events += [event("Memcpy HtoD", gpu, 7), event("Memset (Device)", gpu, 7)]
    profiled = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities, acc_events: profiled)
    found = profile_kernels(lambda i: None, 2, torch.device("cpu"))
    assert (found.count, found.seconds) == (1.5, pytest.approx(65e-6))
    assert found.by_name["gemm"] == pytest.approx(50e-6)
    assert short_name("void at::native::(anonymous namespace)::gemm<c10::Half, 4>(int)") == "gemm<Half, 4>(int)"


@pytest.mark.parametrize("words", ["--turns 0", "--turn-steps -1", "--sparsity nan", "--batch-size 0", f"--max-length {10**20}"])
def test_numbers_out_of_range_are_refused(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["bench.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        bench.parse()
    assert stop.value.code == 2
    assert f"error: {words}: " in capsys.readouterr().err


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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_levers_do_not_change_the_training(calm_bert_dir, glue_dir, precision):
    given = {"model": str(calm_bert_dir), "data_dir": str(glue_dir), "batch_size": 4, "max_length": 48, "limit_train": 40}
    case = baselines.make_case("rte", given | {"lr": 1e-3, "precision": precision}, sparsity=0.5)
    curves = {}
    for name, build in {"ours": baselines.eager, **LEVERS}.items():
        step = build(case)
        curves[name] = [float(step(i)) for i in range(4)]
    expected = curves.pop("ours")
    rounding = 1e-5 if precision == "fp32" else 1e-2
    assert curves.pop("packing") != pytest.approx(expected, abs=1e-5)  # its padding counts as tokens, and costs as much
    for name, curve in curves.items():
        assert curve == pytest.approx(expected, abs=rounding), name


def test_levers_and_the_profile_are_printed(run_bench, bert_dir, glue_dir):
    words = ("--model", bert_dir, "--data-dir", glue_dir, *SMALL, "--tasks", "rte")
    levers = run_bench(*words, "--levers")["rte"]
    assert all(f"{lever}, %" in levers for lever in LEVERS)
    assert "aten::addmm" in run_bench(*words, "--profile")["rte"]
