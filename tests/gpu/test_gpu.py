"""Steps on a GPU: on a fake one always; on a real one (`-m cuda`) with a BERT-base of random weights, and more of them."""

import contextlib
import copy
import gc
import importlib
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from fake_cuda import only_real
from steps import check_equal, take
from trainrun import contents

from bert_tickets.bench.baselines import make_case
from bert_tickets.bench.measure import compare, profile
from bert_tickets.bench.tiny_bert import save_bert
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.parameters import prunable
from bert_tickets.tasks.glue import Glue
from bert_tickets.training.cuda_graphs import Recorder, tensors
from bert_tickets.training.device import set_tf32
from bert_tickets.training.hooks import LossCurve
from bert_tickets.training.loop import train


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A BERT-base of random weights."""
    folder = tmp_path_factory.mktemp("base")
    save_bert(folder)
    return folder


@pytest.fixture
def real(one_gpu):
    """Whether the GPU is real. Within the test torch sees it."""
    with one_gpu():
        yield one_gpu is contextlib.nullcontext


@pytest.fixture
def new_case(real, request):
    """Make a network with half of its weights pruned, and batches of random tokens with MNLI's lengths."""
    model, size = request.getfixturevalue("base_dir" if real else "bert_dir"), 32 if real else 8

    def new(precision, batches, dropout=True):
        given = {"model": str(model), "precision": precision, "batch_size": size, "limit_train": size * batches}
        case = make_case("mnli", given, 0.5)
        for module in case.net.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
        return case

    return new


@pytest.mark.cuda
def test_a_run_killed_in_level_1_and_resumed_has_the_same_files(base_dir, glue_dir, tmp_path):
    """First of all, by the script as a user runs it: what a user must be able to rely on."""
    words = f"--task mnli --model {base_dir} --data-dir {glue_dir} --device cuda --levels 3 --max-steps 30 --save-steps 16"
    command = [sys.executable, str(ROOT / "lt_glue.py"), *words.split()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    subprocess.run(command, cwd=whole, check=True)
    with subprocess.Popen(command, cwd=killed) as process:
        while process.poll() is None:
            for checkpoint in killed.glob("runs/*/checkpoint.safetensors"):
                with contextlib.suppress(UserError, OSError):  # it may be removed meanwhile
                    if read_facts(checkpoint)["level"] == 1:
                        process.kill()
            time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = subprocess.run(command, cwd=killed, check=True, stdout=subprocess.PIPE, text=True)
    assert "level 1/2" in resumed.stdout
    expected, found = contents(whole), contents(killed)
    assert [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)] == []


PRECISIONS = pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])


@PRECISIONS
def test_steps_do_not_wait_repeat_bit_for_bit_and_leave_pruned_weights_zero(new_case, real, precision):
    case, count = new_case(precision, 4), 50 if real else 4
    step, losses = take(case, count)
    check_equal((step, losses), take(case, count))
    for name, kept in case.mask.items():
        assert not step.params[name][~kept.to(case.device)].count_nonzero(), name


@PRECISIONS
def test_steps_by_graphs_equal_eager_ones_bit_for_bit(new_case, real, precision):
    case, count = new_case(precision, 30 if real else 3), 100 if real else 9
    by_graphs = take(case, count, Recorder(required=True))
    assert by_graphs[0].graphs.captured
    check_equal(by_graphs, take(case, count, Recorder(required=True), replays=False))


@only_real
def test_a_step_that_waits_cannot_be_captured_and_the_run_goes_on(new_case, monkeypatch, capsys):
    """A capture that fails leaves nothing behind that changes the eager steps after it."""
    plain = Glue.loss

    def waiting(self, net, batch):
        loss = plain(self, net, batch)
        return loss * (1.0 if loss.item() > 0 else 0.0)

    monkeypatch.setattr(Glue, "loss", waiting)
    case = new_case("fp16", 1)  # one batch: always the same bucket
    captured = take(case, 6, Recorder(required=False))
    torch.cuda.empty_cache()
    assert capsys.readouterr().out.count("cannot be captured") == 1
    check_equal(captured, take(case, 6, Recorder(required=False), replays=False))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_masks_chosen_on_the_gpu_equal_the_cpus(new_case, scope):
    on_gpu = {name: p.detach() for name, p in prunable(new_case("fp32", 1).net).items()}
    masks = []
    for weights in (on_gpu, {name: p.cpu() for name, p in on_gpu.items()}):
        mask = prune(Mask.ones(weights), magnitude(weights), 0.1, scope)
        masks.append(prune(mask, magnitude(weights), 0.5, scope).to("cpu"))
    assert masks[0] == masks[1]


def test_gradients_in_fp32_equal_the_cpus(new_case):
    """To 1e-5 of the largest, without TF32."""
    case, found = new_case("fp32", 1, dropout=False), []
    set_tf32(False, "fp32", case.device)
    batch = case.store.batch(torch.arange(8))
    for net in (case.net, copy.deepcopy(case.net).cpu()):
        case.task.loss(net, replace(batch, **{name: x.to(net.device) for name, x in tensors(batch).items()})).backward()
        found.append({name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None})
    on_gpu, on_cpu = found
    assert on_gpu.keys() == on_cpu.keys()
    largest = max(grad.abs().max() for grad in on_cpu.values())
    assert max((grad - on_gpu[name]).abs().max() for name, grad in on_cpu.items()) <= 1e-5 * largest


@only_real
def test_out_of_memory_advises_grad_accum_with_which_the_losses_are_the_same(new_case):
    case = new_case("fp32", 8, dropout=False)
    case.mask.apply(prunable(case.net))

    def losses(grad_accum):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        size = len(case.store)
        cfg = replace(case.cfg.train, batch_size=size, grad_accum=grad_accum, max_steps=2)
        net, curve = copy.deepcopy(case.net), LossCurve(1)
        batches = Batches(case.store, size, 0, grad_accum=grad_accum)
        train(lambda b: case.task.loss(net, b), dict(net.named_parameters()), batches, cfg, mask=case.mask, hooks=[curve])
        return [loss for _, loss in curve.losses]

    split, enough = losses(4), torch.cuda.max_memory_reserved()
    whole, too_little = losses(1), 0.98 * torch.cuda.max_memory_allocated()
    assert split == pytest.approx(whole, rel=1e-4)
    assert enough < too_little
    torch.cuda.set_per_process_memory_fraction(too_little / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert losses(4) == split
        with pytest.raises(UserError, match="--grad-accum"):
            losses(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


SHOWN = {"_of_keys": "attention", "_update": "adamw"}  # kernels of a step, and their modules


def test_the_kernels_that_a_profile_must_show_are_there():
    assert all(hasattr(importlib.import_module(f"bert_tickets.kernels.{module}"), name) for name, module in SHOWN.items())


@only_real
def test_the_benchmark_measures_three_sides_with_their_kernels(new_case):
    case = new_case("auto", 6)
    found = compare(case, turns=2, steps=2)
    for side in ("eager", "graphs", "released"):
        for figure in ("steps/s", "padded tokens/s", "kernels a step", "GPU busy, %", "memory reserved, MiB"):
            assert found[f"{side}: {figure}"] > 0, found
    assert SHOWN.keys() <= profile(case, 1, 2).keys()
