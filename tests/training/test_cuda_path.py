"""The CUDA path, whole: the training scripts' own `main`, in which devices never mix and steps never wait.

On a pretended GPU, and on a real one where there is one (`-m cuda`).
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
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from captures import step_again
from conftest import needs_pretending
from test_session import SCRIPTS
from transformers import BertConfig, BertForMaskedLM

from bert_tickets.bench import fake_cuda as pretended
from bert_tickets.bench import timing as clock
from bert_tickets.cli import parse
from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling import attention
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import prunable
from bert_tickets.runs.directory import results, run_dir
from bert_tickets.seeds import seeded
from bert_tickets.tasks import mlm
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm, mask_tokens
from bert_tickets.tasks.squad import Squad
from bert_tickets.training.cuda_graphs import Graphs, Recorder
from bert_tickets.training.device import prepare_device
from bert_tickets.training.step import Step


class Real:
    """The GPU of this machine."""

    one_gpu, no_waiting = contextlib.nullcontext, staticmethod(clock.no_waiting)


@pytest.fixture(params=[pytest.param("pretended", marks=needs_pretending), pytest.param("real", marks=pytest.mark.cuda)])
def gpu(request):
    """`one_gpu` and `no_waiting`, of either kind of GPU."""
    return Real if request.param == "real" else pretended


only_pretended = pytest.mark.parametrize("gpu", [pytest.param("pretended", marks=needs_pretending)], indirect=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Its tensors are so small that a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def watched(monkeypatch, gpu):
    """Steps, the batches they take and the outputs of an evaluation's batches must not make the host wait."""

    def never_waits(function):
        def call(*args, **kwargs):
            with gpu.no_waiting():
                return function(*args, **kwargs)

        return call

    for owner, name in ((Step, "__call__"), (Batches, "parts"), (Glue, "outputs"), (Squad, "outputs"), (Mlm, "outputs")):
        monkeypatch.setattr(owner, name, never_waits(getattr(owner, name)))


@pytest.fixture
def captured(monkeypatch, gpu):
    """The captures and replays of CUDA graphs, counted. On a pretended GPU a stand-in takes the step again, as in
    tests/test_graphs.py. What verifies a capture may wait."""
    counts, plain, verify = Counter(), Recorder.record, Graphs._capture

    def record(self, run):
        counts["first captures" if self._place is None else "captures"] += 1
        replay, loss = plain(self, run) if gpu is Real else step_again(run)
        self._place = self._place or "here"  # as a real capture notes it

        def counted():
            counts["replays"] += 1
            replay()

        return counted, loss

    def capture(self, *args):
        with gpu.no_waiting(False):
            return verify(self, *args)

    monkeypatch.setattr(Recorder, "record", record)
    monkeypatch.setattr(Graphs, "_capture", capture)
    return counts


@pytest.fixture
def go(commands, tmp_path, monkeypatch, gpu, watched, captured):
    """Run a script on the GPU, or on the CPU, in a folder of the test's; its results."""

    def run(script, words="", folder="here", device="auto"):
        module, preset = SCRIPTS[script]
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        levels = "" if "--mask" in words else "--levels 2"
        short = "--max-length 40" if script == "lt_glue.py" else ""
        cfg = parse(preset, None, [*commands[script], *f"--max-steps 4 {levels} {short} --device {device} {words}".split()])
        with contextlib.nullcontext() if device == "cpu" else gpu.one_gpu():
            module.main(cfg)
        return results(run_dir(cfg, preset))

    return run


def test_the_device_can_be_set(gpu):
    with gpu.one_gpu():
        assert prepare_device("auto") == prepare_device("cuda") == torch.device("cuda", 0)
        with pytest.raises(UserError, match="no such device"):
            prepare_device("cuda:99")


VARIANTS = {
    "fp16": "",
    "bf16": "--precision bf16",
    "fp32": "--precision fp32",
    "fp32, TF32": "--precision fp32 --tf32",
    "by tensor": "--scope tensor",
    "rewound to a step": "--rewind 2",
    "not rewound": "--rewind none",
    "released": "--protocol released",
    "released, standard pruning": "--protocol released --rewind none",
    "pruned first": "--prune-first",
    "random weights": "--init random",
    "decayed": "--weight-decay 0.01 --save-steps 1",
    "geometric": "--schedule geometric --levels 3",
}


@pytest.mark.parametrize(
    ("script", "variant"),
    [
        *((script, variant) for script in SCRIPTS for variant in ("fp16", "bf16", "fp32")),
        *(("lt_glue.py", variant) for variant in VARIANTS if variant not in ("fp16", "bf16", "fp32")),
        ("lt_squad.py", "rewound to a step"),
        ("lt_pretrain.py", "released"),
    ],
)
def test_a_whole_run_mixes_no_devices_and_its_steps_never_wait(go, tmp_path, script, variant):
    found = go(script, VARIANTS[variant])
    assert [line["level"] for line in found] == list(range(len(found)))
    assert found[1]["sparsity"] == pytest.approx(0.1, abs=1e-3)
    assert all(np.isfinite(loss) for line in found for _, loss in line["losses"])
    (about,) = tmp_path.rglob("run.json")
    facts = json.loads(about.read_text())
    assert facts["fingerprint"]["device"] == "cuda"
    assert facts["fingerprint"]["precision"] == (variant.partition(",")[0] if variant[:2] in ("fp", "bf") else "fp16")
    assert facts["environment"]["gpu"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_given_mask_is_trained(go, script, bert_dir, tmp_path):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.5)
    mask.write(tmp_path / "m.safetensors")
    (line,) = go(script, f"--mask {tmp_path}/m.safetensors")
    assert (line["sparsity"], line["mask_sha256"]) == (0.5, mask.sha256())


@pytest.mark.parametrize(
    ("script", "words", "call"),  # the third step is of level 0, the sixth of level 1
    [
        *((script, "", 6) for script in SCRIPTS),
        ("lt_glue.py", "", 3),
        ("lt_glue.py", "--rewind none", 6),
        ("lt_glue.py", "--rewind 2", 6),
        ("lt_glue.py", "--precision fp32 --protocol released --rewind none", 3),
    ],
)
def test_a_killed_run_that_goes_on_equals_the_whole_one(go, monkeypatch, script, words, call):
    """Killed after a checkpoint."""
    whole = go(script, words, "whole")
    calls, plain = 0, Step.__call__

    def dying(self, batch, lr):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return plain(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            go(script, f"{words} --save-steps 1", "killed")
    assert go(script, f"{words} --save-steps 1", "killed") == whole


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_that_does_not_fit_is_taken_in_parts(go, monkeypatch, script):
    """Gradient accumulation, by the words in which a GPU reports that its memory is used up."""
    task = {"lt_glue.py": Glue, "lt_squad.py": Squad, "lt_pretrain.py": Mlm}[script]
    plain, counted = task.loss, []

    def loss(self, net, batch):
        if len(batch.lengths) > 4:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        counted.append(len(batch.lengths))
        return plain(self, net, batch)

    monkeypatch.setattr(task, "loss", loss)
    found = go(script, "--precision fp32")
    assert all(line["batch_parts"] > 1 for line in found)
    assert max(counted) <= 4


def test_an_evaluation_that_does_not_fit_is_taken_in_smaller_packs(go, monkeypatch, capsys):
    expected, plain = go("lt_squad.py", "--limit-eval 6", "large"), Squad.outputs

    def predict(self, net, batch):
        if not net.training and len(batch.lengths) > 2:
            raise torch.OutOfMemoryError("no room")
        return plain(self, net, batch)

    monkeypatch.setattr(Squad, "outputs", outputs)
    found = go("lt_squad.py", "--limit-eval 6", "small")
    assert "again, in packs of" in capsys.readouterr().out
    assert [line["mask_sha256"] for line in found] == [line["mask_sha256"] for line in expected]


@pytest.mark.parametrize(
    ("script", "words"), [*((script, "") for script in SCRIPTS), ("lt_glue.py", "--graphs on --precision bf16")]
)
def test_steps_by_graphs_never_wait_and_end_in_the_eager_bits(go, captured, monkeypatch, capsys, script, words):
    found = go(script, f"{words} --max-steps 8 --log-every 1", "graphs")
    assert "goes on without CUDA graphs" not in capsys.readouterr().out
    assert captured["first captures"] == 2  # one a level
    assert captured["replays"] > captured["captures"] + 2
    monkeypatch.setattr(Graphs, "_step", lambda self, batch, take, state: take(batch))
    assert go(script, f"{words} --max-steps 8 --log-every 1", "eager") == found


@only_pretended
def test_a_level_waits_no_more_often_for_more_steps(go):
    waits = []
    for steps in (4, 12):
        pretended.waited.clear()
        go("lt_glue.py", f"--graphs off --levels 1 --max-steps {steps} --log-every 100", f"{steps}")
        waits.append(len(pretended.waited))
    assert waits[0] == waits[1]


# ---- the CUDA branch computes what the CPU branch does ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_comes_to_the_same_on_either_device(go, script, calm_bert_dir):
    """fp32 and no dropout, of which the devices draw their own."""
    words = f"--model {calm_bert_dir} --precision fp32"
    there, here = (go(script, words, device, device) for device in ("cuda", "cpu"))
    for a, b in zip(there, here, strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-3)
        assert a["kept"] == b["kept"]
        assert a["init_sha256"] == b["init_sha256"] or a["level"]  # level 1 has other masks where two weights tie


LENGTHS = {"ragged": [3, 17, 9, 40, 33, 8], "even": [24] * 6}


def batch_of(script, shape, net, device):
    """A batch of generated tokens for a task."""
    rng, lengths = np.random.default_rng(0), LENGTHS[shape]
    vocabulary = net.config.vocab_size
    if script == "lt_pretrain.py" and shape == "even":
        corpus = Corpus(rng.integers(5, vocabulary, 6 * 22, dtype=np.int32), "text", (2, 3), 24, device)
        batch = corpus.batch(torch.arange(6))
    else:
        ids = [rng.integers(5, vocabulary, n).tolist() for n in lengths]
        tokens = Tokens.of(ids, [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths])
        labels = rng.integers(0, 3, (6, 2) if script == "lt_squad.py" else 6)
        batch = TokenStore(tokens, labels, device).batch(torch.tensor([4, 0, 2, 5, 1, 3]))
    if script == "lt_pretrain.py":
        batch = mask_tokens(replace(batch, labels=batch.input_ids[0]), [seeded(1, "masks")], 4, vocabulary, even=True)
    return batch


def computed(script, shape, net, device):
    """What a task's network says of a batch: outputs, loss, gradients, all on the CPU."""
    task = {"lt_glue.py": Glue("mnli"), "lt_squad.py": Squad(), "lt_pretrain.py": Mlm()}[script]
    net = net.to(device)
    batch = batch_of(script, shape, net, device)
    outputs = task.predict(net, batch).detach().cpu()
    if script == "lt_pretrain.py":
        outputs = outputs[batch.labels.cpu() >= 0]  # places without a label are there to even out the shapes
    loss = task.loss(net, batch)
    loss.backward()
    return outputs, loss.detach().cpu(), {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", LENGTHS)
@pytest.mark.parametrize(("script", "head"), [("lt_glue.py", "classifier"), ("lt_squad.py", "qa"), ("lt_pretrain.py", "mlm")])
def test_both_branches_compute_the_same_in_double_precision(gpu, calm_bert_dir, script, head, shape):
    labels = 3 if head == "classifier" else 2
    here, there = (load_bert(str(calm_bert_dir), head, "pretrained", 0, labels)[0].double().train() for _ in range(2))
    expected = computed(script, shape, here, torch.device("cpu"))
    with gpu.one_gpu():
        found = computed(script, shape, there, torch.device("cuda", 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def attended(lay_out, batch, device):
    """Attention of two heads of size 8 and its gradients, of tokens that are none of a bucketed batch's spare ones."""
    tokens, generator = batch.input_ids.shape[1], torch.Generator().manual_seed(0)
    drawn = [torch.randn(tokens, 16, generator=generator) for _ in range(4)]
    drawn[3][tokens - batch.padding :] = 0
    *inputs, upstream = (x.to(device, torch.float16).requires_grad_() for x in drawn)
    out = lay_out(batch).attend(*inputs, 0.0)
    (out.float() * upstream.detach().float()).sum().backward()
    found = [x.detach().float().cpu() for x in (out, *(x.grad for x in inputs))]
    assert not any(gradient[tokens - batch.padding :].any() for gradient in found[1:])
    return [x[: tokens - batch.padding] for x in found]


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("lengths", [[3, 17, 9, 40, 33, 8], [24] * 6, [9], [60] * 72 + [64], [10] + [3] * 8])
def test_attention_on_packed_tokens_is_that_on_padded_ones(gpu, lengths, bucketed):
    """To half precision; of the last two, bucketed, more tokens are spare than the longest example has."""
    ids = [[5] * length for length in lengths]
    with gpu.one_gpu():
        device = torch.device("cuda", 0)
        store = TokenStore(Tokens.of(ids, ids), np.zeros(len(ids), int), device)
        batch = store.batch(torch.arange(len(ids)), bucketed=bucketed)
        found = attended(lambda batch: attention._ragged(batch, 2), batch, device)
        expected = attended(lambda batch: attention._padded(batch, 2, torch.float16), batch, device)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_dropout_on_packed_tokens_is_drawn_and_is_the_same_in_the_backward_pass(gpu):
    """Of examples of one token, out = v * factor, and the gradient of v is upstream * factor."""
    with gpu.one_gpu():
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
        (64, torch.bfloat16, attention.Ragged),
        (64, torch.float32, attention.Padded),
        (26, torch.float16, attention.Padded),
        (264, torch.float16, attention.Padded),
    ],
)
def test_what_flash_attention_does_not_take_is_padded(gpu, head_size, dtype, expected):
    with gpu.one_gpu():
        store = TokenStore(Tokens.of([[5] * 3], [[0] * 3]), np.zeros(1, int), torch.device("cuda", 0))
        assert type(attention.layout(store.batch(torch.arange(1)), 2, head_size, dtype)) is expected


@pytest.mark.parametrize("vocabulary", [104, 101])
def test_a_padded_vocabulary_changes_neither_loss_nor_gradients(gpu, vocabulary):
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    net = BertForMaskedLM(config)
    expected = computed("lt_pretrain.py", "ragged", copy.deepcopy(net), torch.device("cpu"))
    with gpu.one_gpu(), torch.autocast("cuda", torch.float16):
        found = computed("lt_pretrain.py", "ragged", net, torch.device("cuda", 0))
        assert mlm._scores(net, torch.zeros(3, 16, device="cuda")).shape == (3, 104)
    torch.testing.assert_close(found[1:], expected[1:], rtol=0.02, atol=2e-3)


def test_masks_chosen_on_the_gpu_are_the_cpus(gpu, bert_dir):
    weights = {name: p.detach() for name, p in prunable(load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]).items()}
    for scope in ("global", "tensor"):
        expected = prune(prune(Mask.ones(weights), magnitude(weights), 0.3, scope), magnitude(weights), 0.5, scope)
        with gpu.one_gpu():
            there = {name: w.to("cuda") for name, w in weights.items()}
            found = prune(prune(Mask.ones(there), magnitude(there), 0.3, scope), magnitude(there), 0.5, scope).to("cpu")
        assert found == expected


# ---- a fault in it is found ----


@dataclass(frozen=True)
class Fault:
    """What stands in a function (`module:name`), what would be wrong there, and with which words a run then ends."""

    where: str
    stands: str
    fault: str
    ends: str
    command: str = "lt_glue.py"


FAULTS = {
    "a device without a number": Fault(
        "device:prepare_device", "torch.cuda.set_device(device)", 'torch.cuda.set_device("cuda")', "specified index"
    ),
    "a network that stays on the CPU": Fault("lottery:prepare", "net.to(device)", "net", "same device"),
    "a number of the step that is waited for": Fault("step:Step._update", "return loss", "loss.item(); return loss", "waits"),
    "an index of the CPU": Fault(
        "attention:_padded",
        "torch.arange(width, device=device)",
        "torch.arange(width)",
        "same device",
        "lt_glue.py --precision fp32",
    ),
    "spare tokens that are of no example": Fault(
        "attention:_ragged", "ends[-1].fill_(tokens)", "ends[-1].copy_(ends[-2])", "not every token"
    ),
    "a blocking copy of the batch": Fault(
        "batches:TokenStore.batch", "ship(examples, device)", "examples.to(device)", "blocking copy"
    ),
    "repeats whose number the host does not know": Fault(
        "batches:TokenStore.batch", ", output_size=tokens", "", "waits for the device: repeat_interleave"
    ),
    "a mask that stays on the CPU": Fault(
        "step:Step.__init__", "kept.to(device, params[name].dtype)", "kept.cpu().to(params[name].dtype)", "same device"
    ),
    "a sum of losses on the CPU": Fault(
        "train:train", "torch.zeros((), device=device)", "torch.zeros(())", "into one on the CPU"
    ),
    "moments that stay on the CPU": Fault(
        "step:Step.set_moments", ".to(self.device, copy=True)", ".cpu().clone()", "on the CPU", "lt_glue.py --rewind none"
    ),
    "a loss scale on the CPU": Fault(
        "step:LossScale.__init__", "torch.full((), 2.0**16, device=device)", "torch.full((), 2.0**16)", "on the CPU"
    ),
    "outputs that are left on the GPU": Fault("train:evaluate", "found.cpu()", "found", "numpy"),
    "a loss that picks by a mask": Fault(
        "tasks.glue:Glue.loss_of",
        "F.cross_entropy(logits, labels)",
        "F.cross_entropy(logits[labels >= 0], labels[labels >= 0])",
        "waits for the device: index",
    ),
    "places of SQuAD's loss on the CPU": Fault(
        "tasks.squad:Squad.loss",
        "torch.arange(batch.longest, device=logits.device)",
        "torch.arange(batch.longest)",
        "same device",
        "lt_squad.py",
    ),
    "masked tokens that are waited for": Fault(
        "tasks.mlm:mask_tokens", "ship(shown, ids.device)", "shown.to(ids.device)", "blocking copy", "lt_pretrain.py"
    ),
    "a corpus with indices of the CPU": Fault(
        "corpus:Corpus.batch", "torch.arange(length, device=device)", "torch.arange(length)", "same device", "lt_pretrain.py"
    ),
    "random numbers of the CPU": Fault(
        "tasks.glue:Glue.loss_of",
        "cross_entropy(logits,",
        "cross_entropy(logits + torch.zeros_like(logits).normal_(generator=torch.Generator()),",
        "generator",
    ),
    "a sum that is not deterministic": Fault(
        "tasks.glue:Glue.loss", "classify(net, batch)", "classify(net, batch).cumsum(1)", "deterministic implementation"
    ),
}


def plant(monkeypatch, fault):
    """Change the source of a function of the package, wherever it is known by its name."""
    module_name, _, path = fault.where.partition(":")
    module = importlib.import_module(f"bert_tickets.{module_name}")
    *outer, name = path.split(".")
    owner = getattr(module, outer[0]) if outer else module
    before = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(before))
    assert source.count(fault.stands) == 1, f"{fault.stands!r} stands {source.count(fault.stands)} times in {fault.where}"
    source = source.replace(fault.stands, fault.fault)
    found: dict = {}
    exec(compile(source, fault.where, "exec", __future__.annotations.compiler_flag), module.__dict__ | {}, found)
    owners = (
        [owner] if outer else [m for n, m in sys.modules.items() if n.startswith("bert_tickets.") and vars(m).get(name) is before]
    )
    for each in owners:
        monkeypatch.setattr(each, name, found[name])


@only_pretended
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(go, monkeypatch, name):
    script, _, words = FAULTS[name].command.partition(" ")
    plant(monkeypatch, FAULTS[name])
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=FAULTS[name].ends):
        go(script, words)
