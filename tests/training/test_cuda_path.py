"""The whole CUDA path: runs of the training scripts, in which devices never mix and no step waits for the GPU.

On a fake GPU, and on a real one if there is one (`-m cuda`).
"""

import __future__

import contextlib
import copy
import importlib
import inspect
import json
import sys
import textwrap
from collections import Counter
from dataclasses import replace

import fake_cuda
import numpy as np
import pytest
import torch
from captures import capture_stand_in
from conftest import needs_fake_cuda
from trainrun import Killed, dying
from transformers import BertConfig, BertForMaskedLM

from bert_tickets.bench.timing import sync_debug
from bert_tickets.cli import parse
from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.data.token_cache import Tokens
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.methods.main import run as run_method
from bert_tickets.modeling import attention
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import prunable
from bert_tickets.runs.directory import level_dir, results, run_dir
from bert_tickets.seeds import seeded
from bert_tickets.tasks import mlm
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm, mask_tokens
from bert_tickets.tasks.squad import Squad
from bert_tickets.training.cuda_graphs import Graphs, Recorder
from bert_tickets.training.step import Step

SCRIPTS = {"glue": "lt_glue.py", "squad": "lt_squad.py", "mlm": "lt_pretrain.py"}
TASKS = {"glue": Glue, "squad": Squad, "mlm": Mlm}
on_fake_gpu = pytest.param(fake_cuda.one_gpu, marks=needs_fake_cuda, id="fake")


@pytest.fixture(params=[on_fake_gpu, pytest.param(contextlib.nullcontext, marks=pytest.mark.cuda, id="real")])
def one_gpu(request):
    """The context with a GPU, fake or real."""
    return request.param


only_fake = pytest.mark.parametrize("one_gpu", [on_fake_gpu], indirect=True)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def never_wait(monkeypatch):
    """Raise if a training step, its batch, or an evaluation batch waits for the GPU."""

    def wrapped(function):
        def call(*args, **kwargs):
            with sync_debug():
                return function(*args, **kwargs)

        return call

    for owner, name in ((Step, "__call__"), (Batches, "parts"), *((task, "predict") for task in TASKS.values())):
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))


@pytest.fixture
def captures(monkeypatch, one_gpu):
    """Count captures and replays of CUDA graphs. On a fake GPU a stand-in takes the step again. Verifying a capture may wait."""
    counts, record, capture = Counter(), Recorder.record, Graphs._capture

    def counted_record(self, step):
        counts["levels" if self._place is None else "captures"] += 1
        replay, loss = record(self, step) if one_gpu is contextlib.nullcontext else capture_stand_in(step, "cuda")
        self._place = self._place or "here"  # as after a real capture

        def counted():
            counts["replays"] += 1
            replay()

        return counted, loss

    def capture_may_wait(self, *args):
        with sync_debug("default"):
            return capture(self, *args)

    monkeypatch.setattr(Recorder, "record", counted_record)
    monkeypatch.setattr(Graphs, "_capture", capture_may_wait)
    return counts


@pytest.fixture
def run(commands, tmp_path, monkeypatch, one_gpu, never_wait, captures):
    """Run a training script in a folder of the test, on the GPU or the CPU; returns its results and its newest weights."""

    def go(kind, words="", folder="here", device="auto"):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        levels = "" if "--mask" in words else "--levels 2"
        short = "--max-length 40" if kind == "glue" else ""
        words = f"--max-steps 4 {levels} {short} --device {device} {words}"
        cfg = parse(kind, None, [*commands[SCRIPTS[kind]], *words.split()])
        with contextlib.nullcontext() if device == "cpu" else one_gpu():
            run_method(cfg)
        found = results(run_dir(cfg))
        return found, (level_dir(run_dir(cfg), len(found) - 1) / "weights.safetensors").read_bytes()

    return go


# ---- whole runs ----


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("squad", "--precision fp16"),
        ("glue", "--precision bf16 --rewind none --weight-decay 0.01"),
        ("glue", "--precision fp32 --tf32 --rewind 2 --scope tensor --init random --prunable matrices+biases --grad-accum 2"),
        ("mlm", "--precision fp16 --protocol released --prunable matrices+embeddings"),
    ],
)
def test_whole_run_mixes_no_devices_and_no_step_waits(run, tmp_path, kind, words):
    found, _ = run(kind, words)
    assert [line["level"] for line in found] == [0, 1]
    assert found[1]["sparsity"] == pytest.approx(0.1, abs=1e-3)
    assert all(np.isfinite(loss) for line in found for _, loss in line["losses"])
    (path,) = tmp_path.rglob("run.json")
    about = json.loads(path.read_text())
    assert about["fingerprint"]["device"] == "cuda"
    assert about["fingerprint"]["precision"] == words.split()[1]
    assert about["environment"]["gpu"]


def test_a_given_mask_is_trained(run, bert_dir, tmp_path):
    weights = prunable(load_bert(str(bert_dir), "classifier", "pretrained", 0)[0])
    mask = prune(Mask.ones(weights), magnitude(weights), 0.5)
    mask.write(tmp_path / "m.safetensors")
    for kind in SCRIPTS:
        ((line,), _) = run(kind, f"--mask {tmp_path}/m.safetensors", kind)
        assert (line["sparsity"], line["mask_sha256"]) == (0.5, mask.sha256())


@pytest.mark.parametrize(
    ("kind", "words", "call"),  # the third step is in level 0, the sixth in level 1
    [("squad", "", 6), ("mlm", "", 3), ("glue", "--precision fp32 --grad-accum 2 --rewind none", 6)],
)
def test_a_killed_run_resumes_to_the_same_bits(run, monkeypatch, kind, words, call):
    whole = run(kind, words, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying(Step.__call__, call))
        with pytest.raises(Killed):
            run(kind, f"{words} --save-steps 1", "killed")
    assert run(kind, f"{words} --save-steps 1", "killed") == whole


@pytest.mark.parametrize(("kind", "words"), [("mlm", ""), ("glue", "--graphs on --precision bf16")])
def test_steps_by_graphs_do_not_wait_and_equal_eager_ones_bit_for_bit(run, captures, monkeypatch, capsys, kind, words):
    found = run(kind, f"{words} --max-steps 8 --log-every 1", "graphs")
    assert "continues without CUDA graphs" not in capsys.readouterr().out
    assert captures["levels"] == 2
    assert captures["replays"] > captures["captures"] + 2
    monkeypatch.setattr(Graphs, "_step", lambda self, batch, take, state: take(batch))
    assert run(kind, f"{words} --max-steps 8 --log-every 1", "eager") == found


@only_fake
def test_more_steps_do_not_wait_more_often(run):
    waits = []
    for steps in (4, 12):
        fake_cuda.synchronizations.clear()
        run("glue", f"--graphs off --levels 1 --max-steps {steps} --log-every 100", f"{steps}")
        waits.append(len(fake_cuda.synchronizations))
    assert waits[0] == waits[1]


def test_a_run_without_dropout_computes_the_same_on_either_device(run, calm_bert_dir):
    words = f"--model {calm_bert_dir} --precision fp32"
    (on_gpu, _), (on_cpu, _) = (run("glue", words, device, device) for device in ("cuda", "cpu"))
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-3)
        assert a["kept"] == b["kept"]
    assert on_gpu[0]["init_sha256"] == on_cpu[0]["init_sha256"]


# ---- parts of it ----


LENGTHS = {"ragged": [3, 17, 9, 40, 33, 8], "even": [24] * 6}


def batch_of(kind, shape, net, device):
    """A batch of random tokens for a kind of task."""
    rng, lengths = np.random.default_rng(0), LENGTHS[shape]
    vocabulary = net.config.vocab_size
    if kind == "mlm" and shape == "even":
        batch = Corpus(rng.integers(5, vocabulary, 6 * 22, dtype=np.int32), "text", (2, 3), 24, device).batch(torch.arange(6))
    else:
        ids = [rng.integers(5, vocabulary, n).tolist() for n in lengths]
        tokens = Tokens.of(ids, [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths])
        labels = rng.integers(0, 3, (6, 2) if kind == "squad" else 6)
        batch = TokenStore(tokens, labels, device).batch(torch.tensor([4, 0, 2, 5, 1, 3]))
    if kind == "mlm":
        batch = mask_tokens(replace(batch, labels=batch.input_ids[0]), [seeded(1, "masks")], 4, vocabulary, even=True)
    return batch


def computed(kind, shape, net, device):
    """Predictions, loss and gradients of a batch, on the CPU."""
    task = Glue("mnli") if kind == "glue" else TASKS[kind]()
    net = net.to(device)
    batch = batch_of(kind, shape, net, device)
    outputs = task.predict(net, batch).detach().cpu()
    if kind == "mlm":
        outputs = outputs[batch.labels.cpu() >= 0]  # places without a label only even out the shapes
    loss = task.loss(net, batch)
    loss.backward()
    return outputs, loss.detach().cpu(), {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", LENGTHS)
@pytest.mark.parametrize(("kind", "head"), [("glue", "classifier"), ("squad", "qa"), ("mlm", "mlm")])
def test_both_devices_compute_the_same_in_fp64(one_gpu, calm_bert_dir, kind, head, shape):
    net = load_bert(str(calm_bert_dir), head, "pretrained", 0, 3 if head == "classifier" else 2)[0].double().train()
    expected = computed(kind, shape, copy.deepcopy(net), torch.device("cpu"))
    with one_gpu():
        found = computed(kind, shape, net, torch.device("cuda", 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def attended(layout, batch, device):
    """Attention of two heads of size 8 and its gradients in fp16, without a bucketed batch's padding."""
    tokens, generator = batch.input_ids.shape[1], torch.Generator().manual_seed(0)
    drawn = [torch.randn(tokens, 16, generator=generator) for _ in range(4)]
    drawn[3][tokens - batch.padding :] = 0
    *inputs, upstream = (x.to(device, torch.float16).requires_grad_() for x in drawn)
    out = layout.attend(*inputs, 0.0)
    (out.float() * upstream.detach().float()).sum().backward()
    found = [x.detach().float().cpu() for x in (out, *(x.grad for x in inputs))]
    assert not any(gradient[tokens - batch.padding :].any() for gradient in found[1:])
    return [x[: tokens - batch.padding] for x in found]


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("lengths", [[3, 17, 9, 40, 33, 8], [60] * 72 + [64], [10] + [3] * 8])
def test_attention_on_packed_tokens_equals_attention_on_padded_ones(one_gpu, lengths, bucketed):
    """In half precision. Bucketed batches of the last two have more padding than the longest example has tokens."""
    ids = [[5] * length for length in lengths]
    with one_gpu():
        device = torch.device("cuda", 0)
        store = TokenStore(Tokens.of(ids, ids), np.zeros(len(ids), int), device)
        batch = store.batch(torch.arange(len(ids)), bucketed=bucketed)
        found = attended(attention._ragged(batch, 2), batch, device)
        expected = attended(attention._padded(batch, 2, torch.float16), batch, device)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_dropout_of_packed_attention_is_the_same_in_the_backward_pass(one_gpu):
    """With examples of one token, out = v * factor, and the gradient of v is upstream * factor."""
    with one_gpu():
        device = torch.device("cuda", 0)
        store = TokenStore(Tokens.of([[5]] * 500, [[0]] * 500), np.zeros(500, int), device)
        grid = attention._ragged(store.batch(torch.arange(500)), 2)
        q, k = torch.randn(2, 500, 16).to(device, torch.float16).unbind(0)
        v = torch.ones(500, 16, device=device, dtype=torch.float16, requires_grad=True)
        out = grid.attend(q, k, v, 0.25)
        out.sum().backward()
        assert torch.equal(out.detach().cpu(), v.grad.cpu())
        assert 0.2 < float((out.cpu() == 0).float().mean()) < 0.3


@pytest.mark.parametrize(
    ("head_size", "dtype", "expected"),
    [
        (8, torch.float16, attention.Ragged),
        (64, torch.float32, attention.Padded),
        (26, torch.float16, attention.Padded),
        (264, torch.float16, attention.Padded),
    ],
)
def test_heads_that_flash_attention_does_not_take_are_padded(one_gpu, head_size, dtype, expected):
    with one_gpu():
        store = TokenStore(Tokens.of([[5] * 3], [[0] * 3]), np.zeros(1, int), torch.device("cuda", 0))
        assert type(attention.layout(store.batch(torch.arange(1)), 2, head_size, dtype)) is expected


@pytest.mark.parametrize("vocabulary", [104, 101])
def test_a_padded_vocabulary_changes_neither_loss_nor_gradients(one_gpu, vocabulary):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **calm))
    expected = computed("mlm", "ragged", copy.deepcopy(net), torch.device("cpu"))
    with one_gpu(), torch.autocast("cuda", torch.float16):
        found = computed("mlm", "ragged", net, torch.device("cuda", 0))
        assert mlm._scores(net, torch.zeros(3, 16, device="cuda")).shape == (3, 104)
    torch.testing.assert_close(found[1:], expected[1:], rtol=0.02, atol=2e-3)


# ---- faults are found ----

# fmt: off
FAULTS = {  # function, the error; the function's text, and the text with the fault
    "a step that waits": (
        "training.step:Step._update", "synchronizing",
        "return loss", "loss.item(); return loss",
    ),
    "padding that belongs to no example": (
        "modeling.attention:_ragged", "not every token",
        "ends[-1].fill_(tokens)", "ends[-1].copy_(ends[-2])",
    ),
    "a blocking copy of a batch": (
        "data.batches:TokenStore.batch", "blocking copy",
        "ship(examples, device)", "examples.to(device)",
    ),
    "a mask on the CPU": (
        "training.step:Step.__init__", "same device",
        "kept.to(device, params[name].dtype)", "kept.cpu().to(params[name].dtype)",
    ),

    "random numbers of the CPU": (
        "tasks.glue:Glue.loss_of", "generator",
        "cross_entropy(logits,", "cross_entropy(logits + torch.zeros_like(logits).normal_(generator=torch.Generator()),",
    ),
    "a nondeterministic sum": (
        "tasks.glue:Glue.loss", "deterministic implementation",
        "classify(net, batch)", "classify(net, batch).cumsum(1)",
    ),
}
# fmt: on


def inject(monkeypatch, where, text, fault):
    """Change the source of a function of the package, in every module that has it."""
    module_name, _, path = where.partition(":")
    module = importlib.import_module(f"bert_tickets.{module_name}")
    *outer, name = path.split(".")
    owner = getattr(module, outer[0]) if outer else module
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(text) == 1, f"{text!r} is {source.count(text)} times in {where}"
    found: dict = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source.replace(text, fault), where, "exec", flags), dict(module.__dict__), found)
    modules = [m for n, m in sys.modules.items() if n.startswith("bert_tickets.") and vars(m).get(name) is original]
    for each in [owner] if outer else modules:
        monkeypatch.setattr(each, name, found[name])


@only_fake
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(run, monkeypatch, name):
    where, message, text, fault = FAULTS[name]
    inject(monkeypatch, where, text, fault)
    with pytest.raises((RuntimeError, ValueError, AssertionError, TypeError), match=message):
        run("glue")
