"""SQuAD: its files or the hub, the loss on packed windows, and the published metrics."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import store_of
from paragraphs import content, labelled_texts, starts_of
from small_hub import write_squad
from test_metrics import put_evaluate
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import BertTokenizerFast

from bert_tickets.config import Config, build
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.squad_features import MAX_ANSWER, eval_windows, train_windows
from bert_tickets.data.squad_files import FILES, read_folder, read_json
from bert_tickets.errors import UserError
from bert_tickets.tasks import squad
from bert_tickets.tasks.squad import Squad

CPU = torch.device("cpu")


def load(folder: Path | None, tokenizer, **given) -> tuple[Squad, TokenStore, TokenStore]:
    """Load the task and its two sets, in windows of 100 tokens that begin 32 apart."""
    given = {"task": "squad", "max_length": 100, "doc_stride": 32, "data_dir": folder and str(folder), **given}
    task = Squad()
    store, evals = task.load_data(build(given), tokenizer, CPU)
    return task, store, evals["validation"]


def one(context: str = "my good film", text: object = "good", start: object = 3, **changes: object) -> dict:
    """Make a file's content with one question, and changes to the question."""
    asked = {"id": "q", "question": "what?", "answers": [{"text": text, "answer_start": start}], **changes}
    return {"data": [{"paragraphs": [{"context": context, "qas": [asked]}]}]}


def written(folder: Path, value: object, file: str = "dev-v1.1.json") -> Path:
    path = folder / file
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# ---- files ----


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_file_of_another_encoding_or_with_a_byte_order_mark_is_read(tmp_path, encoding):
    path = written(tmp_path, one("my größe ", "größe"))
    path.write_text(json.dumps(one("my größe ", "größe"), ensure_ascii=False), encoding=encoding)
    (question,) = read_json(path)
    assert question.found_answer == ("größe", 3)


def test_half_of_a_surrogate_pair_is_a_users_error(tmp_path):
    path = written(tmp_path, one(question="what is \ud83d?"))
    with pytest.raises(UserError, match=r"data\[0\].paragraphs\[0\].qas\[0\] has half of a surrogate pair, '.ud83d'"):
        read_json(path)


def test_a_file_gives_its_questions(squad_dir):
    for split, questions in read_folder(squad_dir).items():
        made = content(FILES[split], len(questions))["data"]
        expected = [(p["context"], asked) for article in made for p in article["paragraphs"] for asked in p["qas"]]
        for q, (context, asked) in zip(questions, expected, strict=True):
            answers = [{"text": text, "answer_start": at} for text, at in q.answers]
            assert (q.context, {"id": q.id, "question": q.question, "answers": answers}) == (context, asked)
            assert q.found_answer == q.answers[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": [{"paragraphs": []}]}, "has no questions"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no 'context'"),
        (one(id=7), r"data\[0\].paragraphs\[0\].qas\[0\], or a field of it, has another type"),
        (one(start="3"), r"qas\[0\], or a field of it, has another type"),
        ({"data": [*one()["data"], 3]}, r"data\[1\], or a field of it, has another type"),
        (one(answers=[]), r"qas\[0\] has no answer.*v2\.0"),
        ({"data": 2 * one()["data"]}, r"data\[1\].paragraphs\[0\].qas\[0\].id 'q' is also the id of another"),
    ],
)
def test_a_missing_field_or_another_type_is_a_users_error_with_its_path(tmp_path, value, message):
    path = written(tmp_path, value)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("text", "start"), [("good", 4), ("good", -9), (" ", 2)])
def test_a_misplaced_answer_is_not_trained_on_but_counts_in_metrics(tmp_path, tokenizer, text, start, capsys):
    train, answers = one(), [(text, start), ("film", 8), ("good", 3)]
    train["data"] += one(text=text, start=start, id="r")["data"]
    train["data"] += one(answers=[{"text": text, "answer_start": start} for text, start in answers], id="s")["data"]
    written(tmp_path, train, "train-v1.1.json")
    written(tmp_path, one(text=text, start=start))
    task, store, evals = load(tmp_path, tokenizer)
    assert "skipped 1 of 3 training questions" in capsys.readouterr().out
    assert (len(store), len(evals)) == (2, 1)
    (first, last), ids = store.labels[1].tolist(), store.batch(torch.tensor([1])).input_ids[0]
    assert tokenizer.decode(ids[first : last + 1]) == "film"  # the first answer that is in its place
    assert task.compute_metrics({"validation": np.zeros((int(evals.lengths.sum()), 2))}, {})["exact_match"] == 0
    task.decode = lambda logits: {"q": text}
    assert task.compute_metrics({"validation": None}, {})["exact_match"] == 1


def test_an_answer_of_no_token_is_skipped_and_reported(tmp_path, tokenizer, capsys):
    train = one()
    train["data"] += one(context="a good film \u200b", text="\u200b", start=12, id="r")["data"]
    written(tmp_path, train, "train-v1.1.json")
    written(tmp_path, one())
    _, store, _ = load(tmp_path, tokenizer)
    assert "skipped 1 of 2 training questions: no token covers the answer: r" in capsys.readouterr().out
    assert len(store) == 1
    for file in FILES.values():
        written(tmp_path, one(start=1), file)
    with pytest.raises(UserError, match="none of SQuAD's training questions"):
        load(tmp_path, tokenizer)


# ---- limits, hashes ----


def test_limits_are_of_questions_and_the_same_for_every_seed(squad_dir, tokenizer):
    _, whole, evals = load(squad_dir, tokenizer)
    stores = [load(squad_dir, tokenizer, limit_train=8, seed=seed)[1] for seed in (1, 2)]
    assert stores[0].sha256 == stores[1].sha256 != whole.sha256
    assert 8 <= len(stores[0]) < len(whole)
    assert stores[0].lengths.tolist() != whole.lengths[: len(stores[0])].tolist()  # drawn from the whole set
    drawn = [load(squad_dir, tokenizer, limit_train=8, limit_seed="run", seed=seed)[1].sha256 for seed in (1, 2, 2)]
    assert len({*drawn, stores[0].sha256}) == 3
    assert drawn[1] == drawn[2]
    few, _, first = load(squad_dir, tokenizer, limit_eval=5)
    assert [q.id for q in few.asked] == [f"q{n}" for n in range(5)]
    assert first.lengths.tolist() == evals.lengths[: len(first)].tolist()


# ---- the hub ----


def test_the_hub_gives_the_same_windows_as_the_files(squad_dir, tokenizer, hub_cache):
    write_squad(hub_cache / "datasets--rajpurkar--squad/snapshots/0123", squad_dir)
    hub, folder = load(None, tokenizer), load(squad_dir, tokenizer)
    assert [store.sha256 for store in hub[1:]] == [store.sha256 for store in folder[1:]]
    assert hub[0].asked == folder[0].asked


# ---- answers ----


def planted(task: Squad, tokenizer, golds: list[tuple[str, int]], cutting: tuple[int, int] = (100, 32)) -> np.ndarray:
    """Make logits that are highest at each question's gold answer, in every window that contains it."""
    made = train_windows(tokenizer, [q.question for q in task.asked], [q.context for q in task.asked], golds, *cutting)
    assert len(made["lengths"]) == len(task.windows["lengths"])
    logits = np.random.default_rng(0).normal(size=(len(made["ids"]), 2)).astype(np.float32)
    has = made["labels"].any(axis=1)
    starts = starts_of(made["lengths"])
    for side in (0, 1):
        logits[(starts + made["labels"][:, side])[has], side] += 30
    return logits


def test_any_gold_answer_scores_1(squad_dir, tokenizer):
    task, _, evals = load(squad_dir, tokenizer)
    for choose in (0, -1):
        golds = [q.answers[choose] for q in task.asked]
        logits = planted(task, tokenizer, golds)
        assert task.decode(logits) == {q.id: text for q, (text, _) in zip(task.asked, golds, strict=True)}
        assert task.compute_metrics({"validation": logits}, {"validation": evals}) == {"f1": 1.0, "exact_match": 1.0}


def test_questions_without_an_answer_are_reported(tmp_path, tokenizer, capsys):
    for file in FILES.values():
        written(tmp_path, one(question="good " * 30), file)
    task, _, evals = load(tmp_path, tokenizer)
    logits = np.zeros((int(evals.lengths.sum()), 2), np.float32)
    logits[1:31] = 9  # the question's tokens
    assert task.decode(logits) == {"q": ""}
    assert "1 of 1 questions have no answer" in capsys.readouterr().out


def test_evaluate_gets_the_answers(squad_dir, tokenizer, monkeypatch):
    asked = put_evaluate(monkeypatch, {"exact_match": 100.0, "f1": 100.0})
    task, _, evals = load(squad_dir, tokenizer, limit_eval=2)
    task.decode = lambda logits: {q.id: q.answers[0][0] for q in task.asked}
    assert "equal" in task.compare_with_evaluate({"validation": None}, {"validation": evals}, {"f1": 1.0, "exact_match": 1.0})
    first = task.asked[0]
    assert asked[0] == ("squad",)
    assert asked[1]["predictions"][0] == {"id": "q0", "prediction_text": first.answers[0][0]}
    assert asked[1]["references"][0] == {
        "id": "q0",
        "answers": {"text": [text for text, _ in first.answers], "answer_start": [at for _, at in first.answers]},
    }


# ---- the network ----


def test_predictions_are_float32_in_half_precision(bert_dir):
    net, _ = Squad().load_net(Config(task="squad", model=str(bert_dir)))
    with torch.autocast("cpu", torch.bfloat16):
        assert Squad().predict(net, store_of([40, 5]).batch(torch.arange(2))).dtype == torch.float32


@pytest.mark.parametrize("padding", [0, 5])
def test_the_loss_is_over_each_windows_own_tokens(monkeypatch, padding):
    lengths = [3, 17, 9, 1]
    batch = store_of(lengths, np.array([[1, 2], [0, 16], [8, 8], [0, 0]])).batch(torch.arange(4))
    batch = dataclasses.replace(batch, longest=batch.longest + padding)
    hidden = torch.randn(30 + padding, 8, requires_grad=True)
    head = types.SimpleNamespace(qa_outputs=nn.Linear(8, 2))
    monkeypatch.setattr(squad, "encode", lambda net, batch: hidden)
    loss = Squad().loss(head, batch)
    logits = head.qa_outputs(hidden)[:30].split(lengths)
    each = [
        F.cross_entropy(part[:, side], label[side]) for part, label in zip(logits, batch.labels, strict=True) for side in (0, 1)
    ]
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-6)
    loss.backward()
    assert (hidden.grad[30:] == 0).all()
    assert hidden.grad[:30].isfinite().all()


# ---- the published file ----


def word_tokenizer(texts: set[str]) -> BertTokenizerFast:
    """Make an uncased tokenizer that knows every word of these texts."""
    cut, words = pre_tokenizers.BertPreTokenizer(), dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    for text in sorted(texts):
        words |= dict.fromkeys(word for word, _ in cut.pre_tokenize_str(normalizers.BertNormalizer().normalize_str(text)))
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), cut
    return BertTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.realdata
def test_gold_answers_of_the_published_file_score_1_or_are_inexact(request):
    """A gold answer of at most `MAX_ANSWER` whole words scores 1 if its logits are highest; the others are few."""
    path = Path(request.config.getoption("--data-dir")) / FILES["validation"]
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    asked = read_json(path)
    assert len(asked) == 10_570
    assert all(q.context.startswith(text, start) for q in asked for text, start in q.answers)
    tokenizer = word_tokenizer({text for q in asked for text in (q.context, q.question)})

    golds = [(q, answer) for q in asked for answer in dict.fromkeys(q.answers)]
    columns = [q.question for q, _ in golds], [q.context for q, _ in golds]
    made = eval_windows(tokenizer, *columns, 384, 128) | train_windows(tokenizer, *columns, [a for _, a in golds], 384, 128)
    has = made["labels"].any(axis=1)
    texts = labelled_texts(made, columns[1])
    assert texts.keys() == set(range(len(golds)))
    answers = [{"".join(text.split())} for _, (text, _) in golds]
    exact = {i for i, found in texts.items() if {"".join(text.split()) for text in found} == answers[i]}
    assert len(golds) - len(exact) == 75  # of 18,216: "gold" of "golden"

    short = made["question"][has & (made["labels"] @ [-1, 1] < MAX_ANSWER)]
    whole: dict[str, tuple[str, int]] = {}
    for i in sorted(exact.intersection(short)):
        whole.setdefault(golds[i][0].id, golds[i][1])
    task = Squad()
    task.asked = [q for q in asked if q.id in whole]
    assert len(task.asked) == 10_570 - 1
    task.windows = eval_windows(tokenizer, [q.question for q in task.asked], [q.context for q in task.asked], 384, 128)
    logits = planted(task, tokenizer, list(whole.values()), (384, 128))
    assert task.decode(logits) == {question: text.strip() for question, (text, _) in whole.items()}
    assert task.compute_metrics({"validation": logits}, {}) == {"f1": 1.0, "exact_match": 1.0}
