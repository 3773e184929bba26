"""scripts/bench.py: what it measures, and that its sides train the same."""

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

from bert_tickets.bench import baselines, measure, onnx_speed, units
from bert_tickets.bench.tiny_bert import save_bert
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.onnx import INPUTS


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
    for task in found["figures"].values():
        assert 4 * 3 <= task["real tokens a step"] <= task["padded tokens a step"] == 4 * 48
        assert task["eager over released, times"] == pytest.approx(task["eager: steps/s"] / task["released: steps/s"])
        assert task["eager: % of the machine's rate"] > 0


def test_a_step_is_profiled_by_operator(run_bench, bert_dir):
    assert "aten::addmm" in run_bench("--model", bert_dir, "--tasks", "rte", "--profile")["figures"]["rte"]


def test_mask_training_is_measured_beside_training_of_weights(run_bench, bert_dir, capsys):
    found = run_bench("--model", bert_dir, "--tasks", "mlm", "--mask-training")["figures"]["mlm"]
    for objective in ("mlm", "kd", "mlm+kd"):
        assert found[f"{objective} over weights, times as long"] == pytest.approx(
            found["weights: steps/s"] / found[f"{objective}: steps/s"]
        )
    with pytest.raises(SystemExit):
        run_bench("--model", bert_dir, "--tasks", "mlm", "cola", "--mask-training")
    assert "--mask-training is for --tasks mlm" in capsys.readouterr().err


def test_mask_training_is_measured_by_its_own_objectives(bert_dir):
    given = {"model": str(bert_dir), "batch_size": 4, "max_length": 48, "limit_train": 8, "device": "cpu"}
    case = baselines.make_case("mlm", given, sparsity=0.5)
    mlm, kd, both = (float(baselines.mask_training(objective, case)(0)) for objective in baselines.OBJECTIVES)
    assert 0 < kd < 2  # a mean of 1 - cosine
    assert mlm > 2
    assert both > mlm


def quick_onnx(net, path):
    """Write a file with the parameters of a network that computes nearly nothing, as torch's exporter takes seconds."""
    onnx = pytest.importorskip("onnx")
    flat = onnx.numpy_helper.from_array(torch.cat([p.detach().flatten() for p in net.parameters()]).numpy(), "flat")
    nodes = [onnx.helper.make_node("ReduceMean", ["flat"], ["mean"])]
    nodes += [onnx.helper.make_node("Size", [name], [f"size of {name}"]) for name in INPUTS]
    outputs = [onnx.helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, [1])]
    outputs += [onnx.helper.make_tensor_value_info(f"size of {name}", onnx.TensorProto.INT64, []) for name in INPUTS]
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", 128]) for name in INPUTS]
    graph = onnx.helper.make_graph(nodes, "quick", given, outputs, [flat])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def test_onnx_files_of_a_ticket_are_measured_dense_and_slim(slim_tickets, monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    output, folder, ran = tmp_path / "bench.json", slim_tickets["rte"].trained, []
    words = ["--onnx", str(folder), "--turns", "1", "--turn-steps", "2"]
    monkeypatch.setattr("sys.argv", ["bench.py", *words, "--json", str(output)])
    monkeypatch.setattr(onnx_speed, "write_onnx", quick_onnx)
    opened = onnx_speed.session

    def session(file):
        def run(names, given):
            assert given["attention_mask"].all()
            ran.append((file.stem, *opened(file).run(names, given)[1:]))

        return SimpleNamespace(run=run)

    monkeypatch.setattr(onnx_speed, "session", session)
    bench.main(bench.parse())
    assert sorted({(name, *map(int, sizes)) for name, *sizes in ran}) == [
        (name, *[batch * 128] * 3) for name in ("dense", "slim") for batch in (1, 32)
    ]
    assert len(ran) == 2 * 2 * 2 * 2  # files, batches, turns, steps
    found = json.loads(output.read_text())
    figures, mask = found["figures"]["rte"], Mask.load(folder / "mask.safetensors")
    assert figures["dense: file, MB"] - figures["slim: file, MB"] == pytest.approx(4 * (mask.total - mask.kept) / 1e6, abs=1e-4)
    for batch in (1, 32):
        ratio = figures[f"dense: batch {batch}, ms"] / figures[f"slim: batch {batch}, ms"]
        assert figures[f"slim over dense, batch {batch}, times"] == pytest.approx(ratio)
    assert f"{found['machine']['threads']} threads, torch {torch.__version__}, onnxruntime" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bench.py", *words, "--max-length", "64"])
    with pytest.raises(SystemExit):
        bench.parse()
    assert "--max-length has no effect with --onnx" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["rte", "mlm"])
def test_slim_execution_is_measured_beside_the_full_network_and_the_masked_one(run_bench, bert_dir, task):
    found = run_bench("--model", bert_dir, "--tasks", task, "--slim", "1,0.5")["figures"][task]
    assert all(found[f"{name}: steps/s"] > 0 < found[f"{name}: examples evaluated/s"] for name in ("full", "masked", "slim"))
    for what, rate in (("a step", "steps/s"), ("evaluation", "examples evaluated/s")):
        expected = found[f"slim: {rate}"] / found[f"full: {rate}"]
        assert found[f"slim over full, {what}, times"] == pytest.approx(expected)
    assert 1 < found["full over slim, FLOPs, times"] < 2


def test_slim_and_masked_networks_take_the_same_steps_and_flops_count_what_is_left(calm_bert_dir, tmp_path):
    given = {"model": str(calm_bert_dir), "batch_size": 4, "max_length": 48, "limit_train": 8, "device": "cpu"}
    case = baselines.make_case("sst2", given | {"lr": 1e-3}, sparsity=0.5)
    cases = units.executions(case, (2, 0.25))
    cases["slim"].mask.write(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="in the mask"):  # of another shape
        units.executions(case, tmp_path / "other.safetensors")
    cases["masked"].mask.write(tmp_path / "mask.safetensors")
    assert units.executions(case, tmp_path / "mask.safetensors")["slim"].mask == cases["slim"].mask
    losses = {name: [float(step(i)) for i in range(2)] for name, step in ((n, baselines.eager(c)) for n, c in cases.items())}
    assert losses["slim"] == pytest.approx(losses["masked"], abs=1e-5)
    assert losses["full"] != pytest.approx(losses["masked"], abs=1e-5)
    assert units.evaluation(cases["slim"])(0) == pytest.approx(units.evaluation(cases["masked"])(0), abs=1e-5)
    lengths = case.store.lengths
    matrices = 2 * (4 * 32 * 16 + 2 * 32 * 48)  # of two layers, with two heads of 8 and 48 neurons
    pooler = len(lengths) * 32 * (32 + 2)  # and the classifier
    operations = 6 * (matrices * lengths.sum() + pooler) + 12 * 2 * 16 * (lengths**2).sum()
    assert measure.case_flops(cases["slim"]) == operations / 2  # 4 of 8 examples


def test_an_importance_pass_is_measured_beside_an_evaluation(run_bench, bert_dir, capsys):
    found = run_bench("--model", bert_dir, "--tasks", "rte", "--importance")["figures"]["rte"]
    ratio = found["evaluation: examples/s"] / found["importance: examples/s"]
    assert found["importance over evaluation, times as long"] == pytest.approx(ratio)
    with pytest.raises(SystemExit):
        run_bench("--model", bert_dir, "--tasks", "mlm", "--importance")
    assert "--importance is for GLUE's tasks" in capsys.readouterr().err


REFUSED = [("0,0", "not both 0"), ("1,2", "not both 0"), ("4", "invalid"), ("9,0.5", "4 heads"), ("1,0 --sparsity .7", "effect")]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_cannot_be_removed_is_refused(run_bench, bert_dir, capsys, words, said):
    with pytest.raises((SystemExit, UserError)) as error:
        run_bench("--model", bert_dir, "--tasks", "rte", "--slim", *words.split())
    assert said in capsys.readouterr().err + str(error.value)


def test_time_in_which_two_kernels_run_counts_once():
    assert measure.covered([]) == 0
    assert measure.covered([(5, 7), (0, 2), (1, 4), (1.5, 2), (7, 8)]) == 7


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


def test_the_released_side_has_the_loss_of_a_regression(calm_bert_dir, glue_dir):
    given = {"model": str(calm_bert_dir), "data_dir": str(glue_dir), "batch_size": 8, "max_length": 48, "limit_train": 8}
    case = baselines.make_case("stsb", given, sparsity=0.5)
    assert baselines.released(case)(0) == pytest.approx(baselines.packed_step(case)[1](0).item(), abs=1e-4)


# ---- gpu_check.sh ----

PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *is_available*) exit $NO_GPU ;; *"-m pytest"*) exit $FAILED ;; esac
"""


@pytest.mark.parametrize(("no_gpu", "failed", "code"), [("0", "0", 0), ("0", "1", 1), ("1", "0", 2)])
def test_gpu_check_runs_the_benchmark_and_the_gpu_tests(tmp_path, no_gpu, failed, code):
    """With a stand-in for the interpreter."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "CALLS": str(calls), "NO_GPU": no_gpu, "FAILED": failed}
    done = subprocess.run(["bash", ROOT / "scripts" / "gpu_check.sh"], cwd=tmp_path, env=os.environ | variables)
    assert done.returncode == code
    assert [word in calls.read_text() for word in ("-m pytest -m cuda", "bench.py")] == [code != 2] * 2
