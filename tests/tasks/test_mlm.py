"""Masked language modelling: the masked tokens, their loss, the network and its tied decoder."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import mlm_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM, BertForPreTraining

from bert_tickets.config import Config, Training
from bert_tickets.data.batches import by_length
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import WORD_EMBEDDINGS, encoder_weights, prunable, rewind, snapshot
from bert_tickets.tasks import mlm
from bert_tickets.tasks.mlm import IGNORED, Mlm, mask_tokens
from bert_tickets.training.step import Step

CPU = torch.device("cpu")
LENGTH, MASK, WORDS = 32, 4, 90


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
    """The small BERT with the heads of its pre-training."""
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


# ---- masks ----


def test_the_rates_are_berts():
    """15 % of the tokens; of these 80 % [MASK], 10 % any token, 10 % unchanged: within five standard deviations."""
    store = blocks(400, 512)
    before = store.batch(torch.arange(400))
    after = masked(before, 0)
    count, words = len(after.chosen), 400 * 510

    def near(found: int, rate: float, of: int) -> bool:
        return abs(found - rate * of) < 5 * math.sqrt(rate * (1 - rate) * of)

    shown = after.input_ids[0, after.chosen]
    assert near(count, 0.15, words)
    itself = 0.1 + 0.1 / WORDS  # a random token may be the same one
    assert near(int((shown == MASK).sum()), 0.8 + 0.1 / WORDS, count)
    assert near(int((shown == after.labels).sum()), itself, count)
    drawn = shown[(shown != MASK) & (shown != after.labels)]
    assert near(len(drawn), 0.1 * (1 - 2 / WORDS), count)
    assert set(drawn.tolist()) == set(range(WORDS)) - {MASK}  # the whole vocabulary, as in the released code


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 6), length=st.integers(3, 40), seed=st.integers(0, 2**40), each=st.booleans(), even=st.booleans())
def test_masks_change_the_chosen_tokens_only(count, length, seed, each, even):
    before = blocks(count, length).batch(torch.arange(count))
    ids = before.input_ids.clone()
    after = masked(before, *range(seed, seed + (count if each else 1)), even=even)
    assert torch.equal(before.input_ids, ids)
    real = after.labels != IGNORED
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


def test_the_masks_of_a_step_depend_on_seed_and_step_alone():
    store, made = blocks(20), task()
    batch, state = store.batch(torch.arange(5)), torch.random.get_rng_state()
    first = made.augment_batch(batch, 3, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched
    torch.rand(1)
    assert same(made.augment_batch(batch, 3, seed=7), first)
    assert not same(made.augment_batch(batch, 4, seed=7), first)
    assert not same(made.augment_batch(batch, 3, seed=8), first)
    other = made.augment_batch(store.batch(torch.arange(5, 10)), 3, seed=7)
    assert torch.equal(other.chosen, first.chosen)  # the places do not depend on the tokens


def test_evaluation_masks_depend_on_the_block_alone():
    made = task()
    store = blocks(30)
    store._augment_batch = made.mask_blocks
    alone = {i: store.batch(torch.tensor([i])) for i in range(30)}
    for indices, batch in by_length(store, 4 * LENGTH):
        parts = [alone[i] for i in indices.tolist()]
        assert torch.equal(batch.input_ids, torch.cat([part.input_ids for part in parts], 1))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        assert torch.equal(batch.chosen, torch.cat([part.chosen + i * LENGTH for i, part in enumerate(parts)]))
    assert len({tuple(part.chosen.tolist()) for part in alone.values()}) > 25


def test_evaluation_masks_have_not_changed():
    """Otherwise metrics before and after the change cannot be compared."""
    batch = task().mask_blocks(blocks(2).batch(torch.arange(2)), torch.arange(2))
    assert batch.chosen.tolist() == [15, 16, 29, 30, 33, 35, 42, 45, 48, 53, 57]
    assert batch.input_ids[0, batch.chosen].tolist() == [80, MASK, 47, MASK, MASK, MASK, MASK, 37, 87, MASK, MASK]


@pytest.mark.parametrize(("count", "length"), [(16, 512), (16, 128), (1, 3)])
def test_even_batches_have_one_shape_and_room_for_the_rarest_draw(count, length, monkeypatch):
    batch = blocks(count, length).batch(torch.arange(count))
    shapes = {masked(batch, seed, even=True).chosen.shape for seed in range(50)}
    assert len(shapes) == 1
    (places,) = shapes.pop()
    assert places < 0.15 * count * length * 1.25 + 64 + 40
    monkeypatch.setattr(mlm, "MASK_RATE", 1.0)
    assert (masked(batch, 0, even=True).labels != IGNORED).sum() == count * (length - 2)


# ---- loss and predictions ----


@pytest.mark.parametrize("even", [False, True])
def test_loss_gradients_and_predictions_are_hugging_faces(net, even, monkeypatch):
    monkeypatch.setattr(mlm, "CHUNK", 7)
    net = net.to(torch.float64).eval()
    batch = masked(blocks(5).batch(torch.arange(5)), 3, even=even)
    real = batch.labels != IGNORED
    outputs = task().predict(net, replace(batch, chosen=batch.chosen[real], labels=batch.labels[real]))
    loss = task().loss(net, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    net.set_attn_implementation("eager")
    expected = mlm_loss(net, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert float(gradients[WORD_EMBEDDINGS].abs().max()) > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=0, atol=1e-10, msg=name)
    scores, labels = net(batch.input_ids.view(5, LENGTH)).logits.flatten(0, 1)[batch.chosen[real]], batch.labels[real]
    torch.testing.assert_close(outputs[:, 0], F.cross_entropy(scores, labels, reduction="none"), rtol=0, atol=1e-10)
    assert outputs[:, 1].tolist() == (scores.argmax(1) == labels).tolist()


def test_loss_and_predictions_are_float32_in_half_precision(net):
    batch = masked(blocks(5).batch(torch.arange(5)), 3)
    net.eval()
    exact = task().loss(net, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, outputs = task().loss(net, batch), task().predict(net, batch)
    assert loss.dtype == outputs.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert len(torch.unique(outputs[:, 0])) == len(outputs)  # sums of half precision would repeat


def test_a_batch_without_a_masked_token_has_loss_and_gradients_zero(net):
    batch, empty = blocks(1).batch(torch.arange(1)), torch.empty(0, dtype=torch.int64)
    none = replace(batch, chosen=empty, labels=empty, chosen_back=torch.full_like(batch.rows, -1))
    loss = task().loss(net, none)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in net.parameters() if p.grad is not None)
    assert task().predict(net, none).shape == (0, 2)


def test_the_metrics_are_accuracy_loss_and_perplexity():
    def metrics(*rows: list[float]) -> dict[str, float]:
        return task().compute_metrics({"validation": np.array(rows, dtype=np.float32).reshape(-1, 2)}, {})

    found = metrics([0.5, 1.0], [1.5, 0.0], [1.0, 1.0], [3.0, 0.0])
    assert found == {"accuracy": 0.5, "loss": 1.5, "perplexity": pytest.approx(math.exp(1.5))}
    assert metrics([1e4, 0.0]) == {"accuracy": 0.0, "loss": 1e4, "perplexity": math.inf}
    many = metrics(*[[0.1, 0.1]] * 200_000)  # summed in double precision
    assert many["loss"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)
    with pytest.raises(UserError, match=r"no token .* is masked"):
        metrics()


# ---- the network ----


def test_the_head_is_the_checkpoints_also_with_the_names_of_published_ones(net, headed_dir, tmp_path, capsys):
    """bert-base-uncased has LayerNorm's gamma and beta, and no tensor for the tied decoder."""
    stored = load_file(headed_dir / "model.safetensors")
    for name, p in net.named_parameters():
        assert torch.equal(p, stored[name]), name
    shutil.copytree(headed_dir, tmp_path / "old")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
        if "decoder" not in name
    }
    assert any("gamma" in name for name in old)
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    found = load_bert(str(tmp_path / "old"), "mlm", "pretrained", 0)[0]
    assert sha256_of(dict(found.named_parameters())) == sha256_of(dict(net.named_parameters()))
    assert tied(found)
    assert capsys.readouterr().out == ""


def test_the_head_of_a_checkpoint_without_one_is_drawn_by_the_seed(bert_dir, capsys):
    first, same_seed, other = (load_bert(str(bert_dir), "mlm", "pretrained", seed)[0] for seed in (1, 1, 2))
    assert capsys.readouterr().out.count("lacks all of a head for masked language modelling: drawn at random") == 3
    assert torch.equal(first.cls.predictions.transform.dense.weight, same_seed.cls.predictions.transform.dense.weight)
    assert not torch.equal(first.cls.predictions.transform.dense.weight, other.cls.predictions.transform.dense.weight)
    assert (first.cls.predictions.transform.LayerNorm.weight == 1).all()
    assert (first.cls.predictions.bias == 0).all()
    stored = load_file(bert_dir / "model.safetensors")
    for name, p in encoder_weights(first).items():  # the embeddings are the decoder
        assert torch.equal(p, stored[name.removeprefix("bert.")]), name
    assert all(p.requires_grad for name, p in first.named_parameters() if name.startswith("cls."))
    assert tied(load_bert(str(bert_dir), "mlm", "random", 0)[0])


def tied(net) -> bool:
    predictions, words = net.cls.predictions, net.bert.embeddings.word_embeddings
    return predictions.decoder.weight is words.weight and predictions.decoder.bias is predictions.bias


def test_the_decoder_stays_tied_to_the_embeddings(net, tmp_path):
    assert tied(net)
    assert sum("decoder" in name for name, _ in net.named_parameters()) == 0
    theta, mask = snapshot(net), prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.3)
    mask.apply(prunable(net))
    made, trained = task(), {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: made.loss(net, batch), trained, Training(), mask, CPU)
    step(masked(blocks(8).batch(torch.arange(8)), 0), 1e-2)
    assert tied(net)
    assert not torch.equal(net.cls.predictions.decoder.weight, theta[WORD_EMBEDDINGS])
    rewind(net, theta, mask)
    assert tied(net)
    assert torch.equal(net.cls.predictions.decoder.weight, theta[WORD_EMBEDDINGS])
    net.save_pretrained(tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path)
    assert tied(again)
    assert all(torch.equal(p, net.get_parameter(name)) for name, p in again.named_parameters())


# ---- data ----


def test_evaluation_blocks_are_masked_and_training_blocks_are_not(corpus_dir, bert_dir, capsys):
    tokenizer = AutoTokenizer.from_pretrained(bert_dir)
    cfg = Config(task="mlm", data_dir=str(corpus_dir), max_length=LENGTH, limit_train=6, limit_eval=5)
    train, evals = Mlm().load_data(cfg, tokenizer, CPU)
    assert (len(train), len(evals["validation"])) == (6, 5)
    assert tokenizer.mask_token_id not in train.batch(torch.arange(4)).input_ids
    held_out = evals["validation"].batch(torch.arange(4))
    assert int((held_out.input_ids == tokenizer.mask_token_id).sum()) > 0.5 * len(held_out.labels) > 0
    assert f"unigram entropy is {evals['validation'].unigram_entropy:.3f} nats" in capsys.readouterr().out
    tokenizer.mask_token = None
    with pytest.raises(UserError, match=r"no \[MASK\]"):
        Mlm().load_data(cfg, tokenizer, CPU)
