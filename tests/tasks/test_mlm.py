"""Masked language modelling: which tokens are masked, what their loss is, and what the network is."""

from __future__ import annotations

import copy
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OTHERS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

import lt_pretrain
from bert_tickets.cli import parse
from bert_tickets.config import Config, Training, build, preset_values
from bert_tickets.data import mlm_dataset as corpus
from bert_tickets.data.batches import Batches, by_length
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import HEADS, load_bert
from bert_tickets.modeling.parameters import encoder_weights, prunable, rewind, snapshot
from bert_tickets.runs.session import Run
from bert_tickets.tasks import mlm
from bert_tickets.tasks.mlm import NONE, Mlm, mask_tokens
from bert_tickets.training.step import Step

CPU = torch.device("cpu")
LENGTH, MASK, WORDS = 32, 4, 90
EMBEDDING = "bert.embeddings.word_embeddings.weight"


def blocks(count: int, length: int = LENGTH) -> Corpus:
    stream = np.random.default_rng(count).integers(5, WORDS, count * (length - 2)).astype(np.uint16)
    return Corpus(stream, "", (2, 3), length)


def masked(batch, *seeds: int, **options):
    return mask_tokens(batch, [torch.Generator().manual_seed(seed) for seed in seeds], MASK, WORDS, **options)


def task() -> Mlm:
    made = Mlm()
    made.mask_id, made.vocabulary = MASK, WORDS
    return made


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "chosen"))


@pytest.fixture(scope="module")
def headed_dir(bert_dir, tmp_path_factory):
    """The small BERT as it would be published: with the heads of its pre-training, and dropout."""
    folder = tmp_path_factory.mktemp("headed")
    net = BertForPreTraining.from_pretrained(bert_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            if name.startswith("cls."):
                p.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, generator=generator)
    net.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def net(headed_dir):
    return load_bert(str(headed_dir), "mlm", "pretrained", 0)[0]


@pytest.fixture
def text_dir(tmp_path, monkeypatch):
    """`en.train` and `en.valid`, and a cache of the test's own."""
    monkeypatch.setattr(corpus, "HF_HOME", str(tmp_path / "hf"))
    rng = random.Random(0)
    for file, count in (("en.train", 3000), ("en.valid", 800)):
        (tmp_path / file).write_text("".join(word + rng.choice("   \n") for word in rng.choices(OTHERS, k=count)))
    return tmp_path


# ---- which tokens are masked ----


def test_the_rates_are_berts():
    """15 % of the words; of these 80 % [MASK], 10 % any token, 10 % themselves: within five standard deviations."""
    store = blocks(400, 512)
    before = store.batch(torch.arange(400))
    after = masked(before, 0)
    count, words = len(after.chosen), 400 * 510

    def near(found: int, share: float, of: int) -> bool:
        return abs(found - share * of) < 5 * math.sqrt(share * (1 - share) * of)

    shown = after.input_ids[0, after.chosen]
    assert near(count, 0.15, words)
    itself = 0.1 + 0.1 / WORDS  # a random token may be the same one
    assert near(int((shown == MASK).sum()), 0.8 + 0.1 / WORDS, count)
    assert near(int((shown == after.labels).sum()), itself, count)
    drawn = shown[(shown != MASK) & (shown != after.labels)]
    assert near(len(drawn), 0.1 * (1 - 2 / WORDS), count)
    assert set(drawn.tolist()) == set(range(WORDS)) - {MASK}  # the whole vocabulary, as in the released code
    occurrences = torch.bincount(drawn, minlength=WORDS)[torch.arange(WORDS) != MASK]
    assert occurrences.max() < 3 * occurrences.float().mean()


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 6), length=st.integers(3, 40), seed=st.integers(0, 2**40), each=st.booleans(), even=st.booleans())
def test_masks_change_what_they_choose_and_nothing_else(count, length, seed, each, even):
    before = blocks(count, length).batch(torch.arange(count))
    ids = before.input_ids.clone()
    after = masked(before, *range(seed, seed + (count if each else 1)), even=even)
    assert torch.equal(before.input_ids, ids)
    real = after.labels != NONE
    places = after.chosen[real]
    assert torch.equal(after.labels[real], ids[0, places])
    assert (places.diff() > 0).all()
    assert not set(places.tolist()) & {end for start in range(0, count * length, length) for end in (start, start + length - 1)}
    others = torch.ones(count * length, dtype=torch.bool)
    others[places] = False
    assert torch.equal(after.input_ids[0, others], ids[0, others])
    assert int(after.input_ids.min()) >= 0
    assert int(after.input_ids.max()) < WORDS
    assert even or real.all()
    assert even <= (len(after.chosen) % 64 == 0)


def test_a_steps_masks_are_a_function_of_seed_and_step():
    store, made = blocks(20), task()
    batch = store.batch(torch.arange(5))
    torch.manual_seed(1)
    first = made.augment_batch(batch, 3, seed=7)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert same(made.augment_batch(batch, 3, seed=7), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched either
    assert not same(made.augment_batch(batch, 4, seed=7), first)
    assert not same(made.augment_batch(batch, 3, seed=8), first)
    other = made.augment_batch(store.batch(torch.arange(5, 10)), 3, seed=7)
    assert torch.equal(other.chosen, first.chosen)  # the places do not depend on the tokens


def test_batches_give_each_step_its_masks_wherever_they_begin():
    store, made = blocks(21), task()

    def batches() -> Batches:
        return Batches(store, 4, 9, augment_batch=lambda batch, step: made.augment_batch(batch, step, 9))

    whole, resumed = batches(), batches()
    assert whole.per_epoch == 6
    steps = [whole[step] for step in range(13)]
    assert same(resumed[12], steps[12])
    assert same(resumed[5], steps[5])
    assert len(steps[5].lengths) == 1
    plain = Batches(store, 4, 9)
    assert torch.equal(steps[7].labels, plain[7].input_ids[0, steps[7].chosen])


def test_an_epoch_masks_other_tokens_than_the_one_before():
    store, made = blocks(8), task()
    batches = Batches(store, 8, 9, augment_batch=lambda batch, step: made.augment_batch(batch, step, 9))
    seen = []
    for epoch in range(2):
        order = Batches(store, 8, 9)
        _ = order[epoch]
        batch = batches[epoch]
        seen.append({(int(order._order[place // LENGTH]), place % LENGTH) for place in batch.chosen.tolist()})
    assert len(seen[0] & seen[1]) < 0.5 * len(seen[0])


def test_evaluation_masks_belong_to_the_block():
    made = task()
    store = blocks(30)
    store._alter = made.fix
    alone = {i: store.batch(torch.tensor([i])) for i in range(30)}
    for indices, batch in by_length(store, 4 * LENGTH):
        parts = [alone[i] for i in indices.tolist()]
        assert torch.equal(batch.input_ids, torch.cat([part.input_ids for part in parts], 1))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        assert torch.equal(batch.chosen, torch.cat([part.chosen + i * LENGTH for i, part in enumerate(parts)]))
    assert len({tuple(part.chosen.tolist()) for part in alone.values()}) > 25
    again = blocks(30)
    again._alter = task().fix
    assert same(again.batch(torch.arange(30)), store.batch(torch.arange(30)))


def test_evaluation_masks_are_these():
    """Runs are compared on them: if this fails, numbers of before and after cannot be compared."""
    batch = task().fix(blocks(2).batch(torch.arange(2)), torch.arange(2))
    assert batch.chosen.tolist() == [15, 16, 29, 30, 33, 35, 42, 45, 48, 53, 57]
    assert batch.input_ids[0, batch.chosen].tolist() == [80, MASK, 47, MASK, MASK, MASK, MASK, 37, 87, MASK, MASK]


@pytest.mark.parametrize(("count", "length"), [(16, 512), (1, 512), (3, 512), (16, 128), (1, 3)])
def test_even_batches_have_one_shape(count, length):
    batch = blocks(count, length).batch(torch.arange(count))
    shapes = {masked(batch, seed, even=True).chosen.shape for seed in range(100)}
    assert len(shapes) == 1
    (places,) = shapes.pop()
    assert places < 0.15 * count * length * 1.25 + 64 + 40


def test_even_batches_find_room_for_the_rarest_draw(monkeypatch):
    monkeypatch.setattr(mlm, "SHARE", 1.0)
    batch = blocks(4).batch(torch.arange(4))
    assert (masked(batch, 0, even=True).labels != NONE).sum() == 4 * (LENGTH - 2)


# ---- the loss, and what is scored ----


def spread(batch) -> torch.Tensor:
    """The labels as Hugging Face takes them: [B, L], -100 where nothing is to be predicted."""
    labels = torch.full_like(batch.input_ids[0], -100)
    real = batch.labels != NONE
    labels[batch.chosen[real]] = batch.labels[real]
    return labels.view(len(batch.lengths), -1)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_loss_and_gradients_are_hugging_faces(net, count, even):
    net = net.to(torch.float64).eval()
    batch = masked(blocks(count).batch(torch.arange(count)), 3, even=even)
    loss = task().loss(net, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    net.set_attn_implementation("eager")
    ids = batch.input_ids.view(count, LENGTH)
    expected = net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=spread(batch)).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert float(gradients[EMBEDDING].abs().max()) > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=0, atol=1e-10, msg=name)


def test_outputs_are_the_likelihoods_and_the_hits(net, monkeypatch):
    monkeypatch.setattr(mlm, "TOGETHER", 7)
    net = net.to(torch.float64).eval()
    batch = masked(blocks(5).batch(torch.arange(5)), 3)
    outputs, loss = task().predict(net, batch), task().loss(net, batch)
    net.set_attn_implementation("eager")
    scores = net(input_ids=batch.input_ids.view(5, LENGTH)).logits.view(-1, net.config.vocab_size)[batch.chosen]
    torch.testing.assert_close(outputs[:, 0], F.cross_entropy(scores, batch.labels, reduction="none"), rtol=0, atol=1e-10)
    assert outputs[:, 1].tolist() == (scores.argmax(1) == batch.labels).tolist()
    assert outputs[:, 0].mean().item() == pytest.approx(loss.item())


def test_the_head_sees_the_masked_tokens_alone(net):
    batch = masked(blocks(5).batch(torch.arange(5)), 3)
    seen = []
    net.cls.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    task().loss(net, batch)
    task().predict(net, batch)
    assert seen == [(len(batch.chosen), net.config.vocab_size)] * 2
    assert len(batch.chosen) < 0.3 * 5 * LENGTH


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_the_products(net, autocast):
    batch = masked(blocks(5).batch(torch.arange(5)), 3)
    net.eval()
    exact = task().loss(net, batch)
    with torch.autocast("cpu", autocast):
        loss, outputs = task().loss(net, batch), task().predict(net, batch)
    assert loss.dtype == outputs.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert len(torch.unique(outputs[:, 0])) == len(outputs)  # sums of half precision would repeat


def test_a_batch_without_a_masked_token_loses_nothing_and_moves_nothing(net):
    batch = blocks(1).batch(torch.arange(1))
    none = replace(batch, chosen=torch.empty(0, dtype=torch.int64), labels=torch.empty(0, dtype=torch.int64))
    loss = task().loss(net, none)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in net.parameters() if p.grad is not None)
    assert task().predict(net, none).shape == (0, 2)


def test_a_score_is_accuracy_loss_and_perplexity():
    values = {"validation": np.array([[0.5, 1.0], [1.5, 0.0], [1.0, 1.0], [3.0, 0.0]], dtype=np.float32)}
    assert task().score(values, {}) == {"accuracy": 0.5, "loss": 1.5, "perplexity": pytest.approx(math.exp(1.5))}
    assert Mlm.metric in task().score(values, {})


def test_a_hopeless_score_is_infinite_and_no_crash():
    assert task().score({"validation": np.array([[1e4, 0.0]])}, {}) == {"accuracy": 0.0, "loss": 1e4, "perplexity": math.inf}


def test_a_score_sums_in_double_precision():
    values = np.full((2_000_000, 2), 0.1, dtype=np.float32)
    assert task().score({"validation": values}, {})["loss"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_a_validation_text_without_a_masked_token_is_refused():
    with pytest.raises(UserError, match=r"no token .* is masked"):
        task().score({"validation": np.empty((0, 2), np.float32)}, {})


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_on_cuda_never_waits_for_the_device(net, precision):
    device, made = torch.device("cuda"), task()
    net.to(device).train()
    store = blocks(64)
    store.device = device
    batches = Batches(store, 8, 0, augment_batch=lambda batch, step: made.augment_batch(batch, step, 0))
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: made.loss(net, batch), trained, Training(precision=precision), None, device)
    torch.use_deterministic_algorithms(True)  # as a run does
    step(batches[0], 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 8):
            step(batches[i], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = Batches(blocks(64), 8, 0)[3]
    on_cpu = made.augment_batch(here, 3, 0)
    assert torch.equal(batches[3].input_ids.cpu(), on_cpu.input_ids)
    assert torch.equal(batches[3].labels.cpu()[: len(on_cpu.labels)], on_cpu.labels)


# ---- the network ----


def test_the_head_is_the_checkpoints_own(net, headed_dir, capsys):
    stored = load_file(headed_dir / "model.safetensors")
    for name, p in net.named_parameters():
        assert torch.equal(p, stored[name]), name
    other = load_bert(str(headed_dir), "mlm", "pretrained", 5)[0]
    assert sha256_of(dict(other.named_parameters())) == sha256_of(dict(net.named_parameters()))
    assert capsys.readouterr().out == ""
    reference = BertForMaskedLM.from_pretrained(headed_dir).eval()
    net.eval()
    ids = blocks(3).batch(torch.arange(3)).input_ids.view(3, LENGTH)
    net.set_attn_implementation("sdpa")
    torch.testing.assert_close(net(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_names_of_the_first_checkpoints_are_understood(net, headed_dir, tmp_path, capsys):
    """bert-base-uncased as published: LayerNorm's gamma and beta, and no tensor for what is tied."""
    shutil.copytree(headed_dir, tmp_path / "old")
    stored = load_file(headed_dir / "model.safetensors")
    old = {}
    for name, tensor in stored.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if "decoder" not in name:
            old[name] = tensor
    assert any("gamma" in name for name in old)
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    found = load_bert(str(tmp_path / "old"), "mlm", "pretrained", 0)[0]
    assert sha256_of(dict(found.named_parameters())) == sha256_of(dict(net.named_parameters()))
    assert tied(found)
    assert capsys.readouterr().out == ""


def test_a_mask_covers_the_pooler_too_and_the_pooler_is_frozen(net, bert_dir, headed_dir):
    assert set(prunable(net)) == set(prunable(load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]))
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    stored = load_file(headed_dir / "model.safetensors")
    assert torch.equal(net.bert.pooler.dense.weight, stored["bert.pooler.dense.weight"])


def test_a_mask_of_bert_base_covers_the_papers_73_matrices():
    with torch.device("meta"):
        net = HEADS["mlm"](BertConfig())
    weights = prunable(net)
    assert len(weights) == 73
    assert sum(p.numel() for p in weights.values()) == 85_524_480


def test_a_checkpoint_without_a_head_says_so_and_gets_one(bert_dir, capsys):
    first, same_seed, other = (load_bert(str(bert_dir), "mlm", "pretrained", seed)[0] for seed in (1, 1, 2))
    assert capsys.readouterr().out.count("has no head for masked language modelling: its transform is drawn anew") == 3
    assert torch.equal(first.cls.predictions.transform.dense.weight, same_seed.cls.predictions.transform.dense.weight)
    assert not torch.equal(first.cls.predictions.transform.dense.weight, other.cls.predictions.transform.dense.weight)
    assert (first.cls.predictions.transform.LayerNorm.weight == 1).all()
    assert (first.cls.predictions.bias == 0).all()
    stored = load_file(bert_dir / "model.safetensors")
    for name, p in encoder_weights(first).items():  # the embeddings above all: they are the decoder
        assert torch.equal(p, stored[name.removeprefix("bert.")]), name
    assert all(p.requires_grad for name, p in first.named_parameters() if name.startswith("cls."))


def tied(net) -> bool:
    predictions, words = net.cls.predictions, net.bert.embeddings.word_embeddings
    return predictions.decoder.weight is words.weight and predictions.decoder.bias is predictions.bias


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("headed", [True, False])
def test_the_decoder_is_the_embeddings_and_stays_so(bert_dir, headed_dir, init, headed, text_dir):
    net, _ = load_bert(str(headed_dir if headed else bert_dir), "mlm", init, 0)
    assert tied(net)
    assert sum("decoder" in name for name, _ in net.named_parameters()) == 0
    theta, mask = snapshot(net), prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.3)
    mask.apply(prunable(net))
    cfg = Training(lr=1e-2)
    made = task()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: made.loss(net, batch), trained, cfg, mask, CPU)
    net.train()
    step(masked(blocks(8).batch(torch.arange(8)), 0), cfg.lr)
    assert tied(net)
    assert not torch.equal(net.cls.predictions.decoder.weight, theta[EMBEDDING])
    rewind(net, theta, mask)
    assert tied(net)
    assert torch.equal(net.cls.predictions.decoder.weight, theta[EMBEDDING])
    net.save_pretrained(text_dir / "model")
    again = BertForMaskedLM.from_pretrained(text_dir / "model")
    assert tied(again)
    assert all(torch.equal(p, net.get_parameter(name)) for name, p in again.named_parameters())
    pooler = BertModel.from_pretrained(text_dir / "model").pooler.dense.weight
    assert torch.equal(pooler, net.bert.pooler.dense.weight)
    assert tied(copy.deepcopy(net))


def test_a_step_trains_all_but_the_pooler_and_the_pruned(net):
    made, before = task(), snapshot(net)
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.3)
    mask.apply(prunable(net))
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: made.loss(net, batch), trained, Training(), mask, CPU)
    net.train()
    for i in range(3):
        step(masked(blocks(8).batch(torch.arange(8)), i), 1e-3)
    for name, p in net.named_parameters():
        expected = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(p, expected) == ("pooler" in name), name
        assert name not in mask or (p[~mask[name]] == 0).all()


# ---- the data, and the preset ----


def load(text_dir, tokenizer, **changes):
    made = Mlm()
    cfg = Config(task="mlm", data_dir=str(text_dir), **{"max_length": LENGTH, **changes})
    return made, *made.load_data(cfg, tokenizer, CPU)


@pytest.fixture
def tokenizer(bert_dir):
    return AutoTokenizer.from_pretrained(bert_dir)


def test_the_data_are_blocks_to_mask_and_blocks_that_are_masked(text_dir, tokenizer, capsys):
    made, train, evals = load(text_dir, tokenizer)
    assert list(evals) == ["validation"]
    batch = train.batch(torch.arange(4))
    assert batch.chosen is None
    assert tokenizer.mask_token_id not in batch.input_ids
    held_out = evals["validation"].batch(torch.arange(4))
    assert held_out.chosen is not None
    assert int((held_out.input_ids == tokenizer.mask_token_id).sum()) > 0.5 * len(held_out.labels) > 0
    out = capsys.readouterr().out
    assert f"{len(train):,} blocks of {LENGTH} tokens" in out
    assert f"{evals['validation'].unigram_entropy:.3f} nats" in out
    assert 2 < train.unigram_entropy < math.log(len(tokenizer))
    altered = made.augment_batch(batch, 0, 0)
    assert int(altered.input_ids.max()) < len(tokenizer)


def test_limits_are_blocks_and_the_same_for_every_seed(text_dir, tokenizer):
    fingerprints = set()
    for seed in (1, 2):
        _, train, evals = load(text_dir, tokenizer, limit_train=6, limit_eval=3, train=Training(seed=seed))
        assert (len(train), len(evals["validation"])) == (6, 3)
        fingerprints.add((train.sha256, evals["validation"].sha256))
    assert len(fingerprints) == 1


def test_a_tokenizer_without_a_mask_token_is_refused(text_dir, tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(UserError, match=r"no \[MASK\]"):
        load(text_dir, tokenizer)


def test_the_presets_are_table_1():
    paper, released = (preset_values("mlm", protocol) for protocol in ("paper", "released"))
    table = {"max_steps": 10_000, "batch_size": 16, "lr": 5e-5, "max_length": 512}
    assert {name: paper[name] for name in table} == {name: released[name] for name in table} == table
    assert (released["rewind"], released["reset_optimizer"]) == ("none", True)
    cfg = build("mlm", {"task": "mlm", "protocol": "released"})
    assert cfg.resets_optimizer
    assert cfg.decay == "level"


def test_epochs_take_the_place_of_the_presets_steps():
    assert build("mlm", {"task": "mlm", "epochs": 0.1}).train.max_steps is None
    with pytest.raises(UserError, match="--epochs has no effect beside --max-steps"):
        build("mlm", {"task": "mlm", "epochs": 0.1, "max_steps": 5})
    assert build("mlm", {"task": "mlm"}).train.max_steps == 10_000


# ---- the script ----


@pytest.fixture
def pretrain(headed_dir, text_dir, monkeypatch):
    """`lt_pretrain.py` in this process with small settings: (run, results)."""
    monkeypatch.chdir(text_dir)

    def go(*extra: object) -> tuple[Run, list]:
        argv = f"--model {headed_dir} --data-dir {text_dir} --batch-size 8 --max-steps 6 --lr 1e-2 --max-length {LENGTH}"
        argv += " --limit-eval 10 --log-every 2" + ("" if "--mask" in extra else " --levels 2 --rate 0.3")
        cfg = parse("mlm", None, argv.split() + [str(word) for word in extra])
        lt_pretrain.main(cfg)
        run = Run(cfg, "mlm")
        return run, run.results()

    return go


def test_tickets_are_found_by_masked_words(pretrain, text_dir):
    run, results = pretrain()
    assert [result["steps"] for result in results] == [6, 6]
    assert [set(result["metrics"]) for result in results] == [{"accuracy", "loss", "perplexity"}] * 2
    assert results[0]["metric"] == "accuracy"
    assert results[0]["losses"][-1][1] < results[0]["losses"][0][1]
    mask = run.level_dir(1) / "mask.safetensors"
    _, (alone,) = pretrain("--mask", mask)
    assert alone["metrics"] == results[1]["metrics"]  # the ticket, trained from theta_0 once more


def test_a_stopped_run_goes_on_to_the_same_bits(pretrain, monkeypatch):
    _, whole = pretrain()
    plain = Step.__call__
    steps = []

    def stop_in_the_fourth(self, batch, lr):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return plain(self, batch, lr)

    monkeypatch.setattr(Step, "__call__", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pretrain("--save-steps", 2, "--output-dir", "again")
    _, resumed = pretrain("--save-steps", 2, "--output-dir", "again")
    assert len(steps) == 4 + 4 + 6  # from the checkpoint of step 2 on
    assert resumed == whole


def test_the_released_protocol_prunes_theta0_first_and_then_goes_on_without_rewinding(pretrain, headed_dir):
    run, results = pretrain("--protocol", "released", "--keep-models", "--levels", "3")
    kept = run.level_dir(1) / "model"
    whole = load_file(kept / "model.safetensors") | load_file(kept / "pooler.safetensors")
    sources = [load_file(headed_dir / "model.safetensors"), whole]
    for level, weights in zip((1, 2), sources, strict=True):
        mask = Mask.load(run.level_dir(level) / "mask.safetensors")
        encoder = {name: w for name, w in weights.items() if name.startswith("bert.")}
        start = {name: w * mask[name] if name in mask else w for name, w in encoder.items()}
        assert results[level]["init_sha256"] == sha256_of(start)
    first = {name: sources[0][name] for name in mask}
    assert prune(Mask.ones(first), magnitude(first), 0.3) == Mask.load(run.level_dir(1) / "mask.safetensors")
