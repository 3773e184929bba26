"""Mask training against values of its released code, its invariants, and runs that are killed and resumed (Liu et al. 2022)."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula_net import POOLER, WHICH, formula_batch, formula_net, start_of, student_of
from test_mask_training_flags import settings, words
from trainrun import Runs, train

from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.data.mlm_dataset import load_corpus
from bert_tickets.data.pair_dataset import load_pairs
from bert_tickets.data.text_source import find_texts
from bert_tickets.data.token_cache import Tokens
from bert_tickets.files import read_tensors, sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.straight_through import initial_scores, masked, refresh
from bert_tickets.methods import mask_training
from bert_tickets.methods.oneshot import oneshot
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import DECODER, WORD_EMBEDDINGS, encoder_weights, prunable
from bert_tickets.runs.directory import level_dir, results
from bert_tickets.seeds import seeded
from bert_tickets.tasks.distillation import distance, hidden_states, real_tokens
from bert_tickets.tasks.mlm import Mlm, mask_tokens
from bert_tickets.training.distributed import SINGLE_PROCESS
from bert_tickets.training.mask_scores import MaskedNetwork

net, batch = pytest.fixture(formula_net), pytest.fixture(formula_batch)


# ---- invariants ----


def test_scores_begin_with_one_shots_mask_and_a_second_refresh_changes_nothing(net):
    mask = oneshot(net, 0.7, "magnitude", 0, "tensor", WHICH)
    scores = initial_scores(mask)
    assert {round(value, 6) for tensor in scores.values() for value in tensor.unique().tolist()} == {0.0, 0.02}
    student = MaskedNetwork(net, mask)
    assert student.kept() == mask.kept
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in student.scores.values():
            tensor.add_(torch.randn_like(tensor) * 0.01)
    assert student.kept() != mask.kept
    first = student.refresh(0.7, "round")
    assert first != mask
    assert {name: int(kept.sum()) for name, kept in first.items()} == {
        n: k.numel() - round(0.7 * k.numel()) for n, k in mask.items()
    }
    thresholds = dict(student.thresholds)
    assert student.refresh(0.7, "round") == first
    assert student.kept() == first.kept
    assert all(student.thresholds[name] is tensor for name, tensor in thresholds.items())  # which CUDA graphs read


def test_ties_at_the_threshold_go_by_index_or_all(net):
    scores = {"w": torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.02], [0.02, 0.02, 0.02, 0.02, 0.02]])}
    mask, thresholds = refresh(scores, 0.25, "round")
    assert mask["w"].flatten().tolist() == [False, False] + [True] * 8
    assert thresholds["w"] == 0
    assert refresh(scores, 0.25, "int")[0]["w"].flatten().tolist() == [False] * 4 + [True] * 6
    assert refresh({"w": torch.arange(8.0)}, 0.2, "round")[0].kept == 6  # of 1.6
    assert refresh({"w": torch.arange(8.0)}, 0.2, "int")[0].kept == 7


def test_the_gradient_of_a_score_is_weight_times_gradient_of_the_masked_weight():
    torch.manual_seed(0)
    weight, scores = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.5, dtype=torch.float64)
    effective = (weight * (scores > threshold)).requires_grad_()
    x = torch.randn(3, 4, dtype=torch.float64)
    for made in (masked(weight, scores, threshold), effective):
        F.linear(x, made).square().sum().backward()
    torch.testing.assert_close(scores.grad, weight * effective.grad, rtol=0, atol=1e-12)
    assert scores.grad[scores <= threshold].any()  # also of pruned weights


def test_the_dense_mask_is_at_distance_zero_and_training_brings_one_shots_nearer(net, batch):
    assert distance(student_of(net, Mask.ones(prunable(net, WHICH)))(hidden_states, batch), hidden_states(net, batch),
                    real_tokens(batch)).item() == pytest.approx(0, abs=1e-12)  # fmt: skip
    student, losses = student_of(net, start_of(net)), []
    teacher = [x.detach() for x in hidden_states(net, batch)]
    before = sha256_of(dict(net.named_parameters()))
    optimizer = torch.optim.AdamW(student.scores.values(), lr=1e-3, weight_decay=0)
    for _ in range(30):
        losses.append(distance(student(hidden_states, batch), teacher, real_tokens(batch)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.4
    assert losses[-1] < 0.8 * losses[0]
    assert sha256_of(dict(net.named_parameters())) == before
    assert torch.equal(student.scores[POOLER].float(), initial_scores(start_of(net))[POOLER])


def test_a_masked_embedding_does_not_mask_the_tied_decoder(bert_dir):
    """Neither while scores are trained nor when the ticket is scored; its scores have no gradient through the decoder."""
    net = load_bert(str(bert_dir), "mlm", "pretrained", 0)[0].eval()
    assert net.cls.predictions.decoder.weight is net.get_parameter(WORD_EMBEDDINGS)
    student = MaskedNetwork(net, oneshot(net, 0.5, "magnitude", 0, "tensor", WHICH))
    seen = student(lambda net, _: (net.bert.embeddings.word_embeddings.weight, net.cls.predictions.decoder.weight), None)
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert not (seen[1] == 0).any()
    params = student.params(head=True)
    assert {name for name in params if not name.startswith("score.")} == {
        *(f"cls.predictions.transform.{part}" for part in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")),
        "cls.predictions.bias",
    }
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {n for n in params if not n.startswith("score.")}
    student(lambda net, _: net.cls(torch.randn(3, net.config.hidden_size)).sum(), None).backward()
    assert student.scores[WORD_EMBEDDINGS].grad is None


def test_the_objectives_are_the_losses_and_their_sum(calm_bert_dir):
    """Without dropout, on masked text; positions that do not count have no part in the distance."""
    net, task = load_bert(str(calm_bert_dir), "mlm", "pretrained", 0)[0], Mlm()
    ids = [[5 + (3 * i + j) % 90 for j in range(12)] for i in range(6)]
    store = TokenStore(Tokens.of(ids, [[0] * 12] * 6), np.zeros(6, int))
    batch = store.batch(torch.arange(6))
    batch = mask_tokens(replace(batch, labels=batch.input_ids[0]), [seeded(1, "masks")], 4, net.config.vocab_size)
    student = MaskedNetwork(net, oneshot(net, 0.5, "magnitude", 0, "tensor", WHICH))
    given = {name: settings("--sparsity", "0.5", "--objective", name) for name in ("mlm", "kd", "mlm+kd")}
    values = {name: mask_training.loss(cfg, cfg.settings, task, student, batch).item() for name, cfg in given.items()}
    assert values["mlm+kd"] == pytest.approx(values["mlm"] + values["kd"], rel=1e-6)
    assert min(values.values()) > 0.001
    states, teacher = student(hidden_states, batch), hidden_states(net, batch)
    counted = torch.arange(72) < 30
    first = [[x[:30] for x in both] for both in (states, teacher)]
    expected = distance(*first, torch.ones(30, dtype=torch.bool)).item()
    assert distance(states, teacher, counted).item() == pytest.approx(expected, rel=1e-6) != values["kd"]


# ---- runs ----


@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
def test_a_run_killed_at_any_step_ends_with_the_same_bits(of_documents, tmp_path, monkeypatch, objective):
    """Scores, thresholds, moments and the MLM head are in the checkpoint; masks that were saved on the way are the same."""
    runs = Runs("lt_pretrain.py", [*of_documents, *words(objective)], tmp_path, monkeypatch)
    whole = runs("whole")
    assert {f"masks/step_000000{step}.safetensors" for step in (2, 4, 6)} <= whole.keys()
    for step in (2, 4, 6):
        runs.killed_at(step, f"killed{step}")
        assert runs(f"killed{step}") == whole


@pytest.mark.parametrize(("objective", "length"), [("kd", 40), ("mlm+kd", 8)])
def test_parts_of_a_batch_have_the_loss_of_the_whole(of_documents, calm_bert_dir, tmp_path, objective, length):
    """Its mean is over tokens: pairs are of unequal lengths, and some short blocks have no masked token."""
    model = ["--model", calm_bert_dir, "--max-length", length, "--log-every", "1"]
    losses = []
    for parts in (1, 8):
        run = train("lt_pretrain.py", [*of_documents, *words(objective, *model, "--grad-accum", parts, "--output-dir", tmp_path)])
        (line,) = results(run)
        losses.append([loss for _, loss in line["losses"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1], "the batch was split"


def test_the_ticket_is_exact_trains_elsewhere_and_leaves_theta_as_it_was(of_documents, commands, bert_dir, tmp_path):
    run = train("lt_pretrain.py", [*of_documents, *words("mlm", "--lr", "3e-3", "--output-dir", tmp_path)])
    (line,) = results(run)
    ticket, theta = Mask.load(level_dir(run, 0) / "mask.safetensors"), load_bert(str(bert_dir), "mlm", "pretrained", 57)[0]
    start = oneshot(theta, 0.5, "magnitude", 57, "tensor", WHICH)
    assert ticket == Mask.load(run / "masks" / "step_0000006.safetensors") != start
    assert [int(kept.sum()) for kept in ticket.values()] == [int(kept.sum()) for kept in start.values()]
    assert torch.equal(ticket[POOLER], start[POOLER])
    assert [record["step"] for record in line["refreshes"]] == [2, 4, 6]
    assert line["refreshes"][-1]["from_start"] == ticket.distance(start) > 0
    assert line["refreshes"][-1]["sparsity"] == pytest.approx(0.5, abs=1e-3) != line["refreshes"][-1]["sparsity_before"]
    assert line["refreshes"][-1]["metrics"] == line["metrics"]  # after the last refresh, with the head that was trained
    weights = read_tensors(level_dir(run, 0) / "weights.safetensors")
    for name, p in encoder_weights(theta).items():
        assert torch.equal(weights[name], p.detach() * ticket[name] if name in ticket else p.detach()), name
    assert line["init_sha256"] == sha256_of({name: weights[name] for name in encoder_weights(theta)})  # which export.py restores
    assert torch.equal(weights[DECODER], theta.get_parameter(WORD_EMBEDDINGS))
    assert not torch.equal(weights["cls.predictions.bias"], theta.cls.predictions.bias)
    (after,) = results(train("lt_glue.py", [*commands["lt_glue.py"], "--mask", level_dir(run, 0) / "mask.safetensors",
                                            "--output-dir", tmp_path / "glue"]))  # fmt: skip
    assert after["mask_sha256"] == ticket.sha256()


def test_without_a_learning_rate_the_ticket_is_one_shots(of_documents, bert_dir, tmp_path):
    run = train("lt_pretrain.py", [*of_documents, *words("kd", "--lr", "1e-30", "--weight-decay", "0", "--output-dir", tmp_path)])
    theta = load_bert(str(bert_dir), "mlm", "pretrained", 57)[0]
    assert Mask.load(level_dir(run, 0) / "mask.safetensors") == oneshot(theta, 0.5, "magnitude", 57, "tensor", WHICH)


def test_a_ticket_is_scored_with_the_pre_trained_head(of_documents, bert_dir, tmp_path):
    """Of the dense network's mask the distances are 0, and MLM's loss is the dense network's."""
    net = load_bert(str(bert_dir), "mlm", "pretrained", 57)[0]
    found = {}
    for sparsity in (0.0, 0.5):
        path = tmp_path / f"{sparsity}.safetensors"
        oneshot(net, sparsity, "magnitude", 0, "tensor", WHICH).write(path)
        run = train("lt_pretrain.py", [*of_documents, "--score", "--mask", path, "--output-dir", tmp_path])
        (found[sparsity],) = results(run)
        weights = read_tensors(level_dir(run, 0) / "weights.safetensors")
        assert torch.equal(weights[DECODER], net.get_parameter(WORD_EMBEDDINGS)) or sparsity == 0
    (dense,) = results(
        train("lt_pretrain.py", [*of_documents, "--levels", "1", "--max-steps", "1", "--lr", "1e-30", "--output-dir", tmp_path])
    )
    assert found[0.0]["metrics"]["loss"] == pytest.approx(dense["metrics"]["loss"], abs=1e-5)
    assert found[0.0]["hidden_states"] == {"cosine": pytest.approx(0, abs=1e-6), "mse": pytest.approx(0, abs=1e-12)}
    tokenizer = load_bert(str(bert_dir), "mlm", "pretrained", 57)[1]
    text = load_corpus(find_texts(of_documents[of_documents.index("--data-dir") + 1])["validation"], tokenizer, 16, 9).batch(
        torch.arange(9)
    )
    student = MaskedNetwork(net.eval(), Mask.load(tmp_path / "0.5.safetensors"))
    states = student(hidden_states, text), hidden_states(net, text)
    for kind, value in found[0.5]["hidden_states"].items():  # of the text without masked tokens
        assert value == pytest.approx(distance(*states, real_tokens(text), kind).item(), rel=1e-4)
    assert found[0.5]["steps"] == 0


def test_distillation_reads_pairs_that_are_not_corrupted(of_documents, bert_dir, tmp_path):
    cfg = settings(
        "--sparsity",
        "0.5",
        "--objective",
        "kd",
        "--max-length",
        "40",
        "--data-dir",
        of_documents[of_documents.index("--data-dir") + 1],
    )
    store = TokenStore(Tokens.of([[5]], [[0]]), np.zeros(1, int))
    batches = Batches(store, 4, 0, augment_batch=lambda batch, step: pytest.fail("the text is corrupted"))
    tokenizer = load_bert(str(bert_dir), "mlm", "pretrained", 57)[1]
    session = SimpleNamespace(cfg=cfg, batches=batches, tokenizer=tokenizer, run=SimpleNamespace(group=SINGLE_PROCESS))
    pairs = mask_training.pairs(session)
    (batch,) = pairs.parts(0)
    assert (len(batch.lengths), bool(batch.token_type_ids.any())) == (4, True)
    assert tokenizer.mask_token_id not in batch.input_ids
    epoch = f"--method mask-training --sparsity 0.5 --objective kd --epochs 1 --output-dir {tmp_path}".split()
    (line,) = results(train("lt_pretrain.py", [*of_documents, *epoch]))
    assert line["steps"] == -(-len(load_pairs(find_texts(cfg.data_dir)["train"], tokenizer, 16, 57)) // 8)  # of pairs, not blocks
