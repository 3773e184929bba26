"""SQuAD: read from its files or the hub, a loss over packed windows, and answers scored as published."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paragraphs import content
from test_metrics import put_evaluate
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, BertTokenizerFast

import lt_squad
from bert_tickets.cli import parse
from bert_tickets.config import Config, build
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.squad_features import LONGEST, eval_windows, train_windows
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.imp import oneshot
from bert_tickets.modeling.parameters import prunable
from bert_tickets.runs.session import Run
from bert_tickets.tasks import squad
from bert_tickets.tasks.squad import FILES, Squad, read_folder, read_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(bert_dir):
    return AutoTokenizer.from_pretrained(bert_dir)


def load(folder: Path | None, tokenizer, **given) -> tuple[Squad, TokenStore, TokenStore]:
    """The task and its two sets, in windows of 100 tokens that begin 32 apart."""
    given = {"task": "squad", "max_length": 100, "doc_stride": 32, "data_dir": folder and str(folder), **given}
    task = Squad()
    store, evals = task.load_data(build("squad", given), tokenizer, CPU)
    return task, store, evals["validation"]


def one(context: str = "my good film", text: object = "good", start: object = 3, **changes: object) -> dict:
    """A file's content with one question, and changes to the question."""
    asked = {"id": "q", "question": "what?", "answers": [{"text": text, "answer_start": start}], **changes}
    return {"data": [{"paragraphs": [{"context": context, "qas": [asked]}]}]}


def written(folder: Path, value: object, file: str = "dev-v1.1.json") -> Path:
    path = folder / file
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# ---- reading ----


def test_a_file_gives_its_questions(squad_dir):
    for split, file in FILES.items():
        raw = [p for article in content(file, 30 if split == "train" else 20)["data"] for p in article["paragraphs"]]
        read = read_folder(squad_dir)[split]
        assert [(q.id, q.question, q.context) for q in read] == [
            (p["qas"][0]["id"], p["qas"][0]["question"], p["context"]) for p in raw
        ]
        assert [[{"text": text, "answer_start": at} for text, at in q.answers] for q in read] == [
            p["qas"][0]["answers"] for p in raw
        ]
        assert all(q.standing == q.answers[0] for q in read)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "damaged"),
        (json.dumps(one())[:-20], "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"data": ' * 100_000, "damaged"),
        ([], "the file is a list"),
        ("null", "the file is null"),
        ({"version": "1.1"}, "the file has no 'data'"),
        ({"data": {}}, "the file.data is an object, where SQuAD has a list"),
        ({"data": []}, "has no questions"),
        ({"data": [{"paragraphs": []}]}, "has no questions"),
        ({"data": ["x"]}, r"data\[0\] is a text"),
        ({"data": [{"title": "x"}]}, r"data\[0\] has no 'paragraphs'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no 'context'"),
        (
            {"data": [{"paragraphs": [{"context": ["x"], "qas": []}]}]},
            r"paragraphs\[0\].context is a list, where SQuAD has a text",
        ),
        ({"data": [{"paragraphs": [{"context": "x"}]}]}, r"paragraphs\[0\] has no 'qas'"),
        (one(id=7), r"data\[0\].paragraphs\[0\].qas\[0\].id is a whole number, where SQuAD has a text"),
        (one(question=None), r"qas\[0\].question is null"),
        (one(answers="good"), r"qas\[0\].answers is a text, where SQuAD has a list"),
        (one(answers=[{"text": "good"}]), r"qas\[0\].answers\[0\] has no 'answer_start'"),
        (one(answers=[]), r"qas\[0\] has no answer.*v2\.0"),
        (one(start="2"), r"answers\[0\].answer_start is a text, where SQuAD has a whole number"),
        (one(start=2.0), r"answers\[0\].answer_start is a number"),
        (one(start=True), r"answers\[0\].answer_start is true or false"),
        (one(text=None), r"answers\[0\].text is null"),
        (one(context="a \ud800 film"), r"paragraphs\[0\].context is no text: character 2 is half a surrogate pair"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused_with_the_place(tmp_path, value, said):
    path = written(tmp_path, value)
    with pytest.raises(UserError, match=said) as refusal:
        read_json(path)
    assert str(path) in str(refusal.value)


def test_a_question_that_has_anothers_id_is_refused(tmp_path):
    twice = one()
    twice["data"] += one(question="who?")["data"]
    with pytest.raises(UserError, match=r"data\[1\].paragraphs\[0\].qas\[0\].id 'q' is another question's"):
        read_json(written(tmp_path, twice))


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "dev-v1.1.json"
    path.write_bytes(json.dumps(one(), ensure_ascii=False).encode().replace(b"film", b"f\xfflm"))
    with pytest.raises(UserError, match="damaged"):
        read_json(path)


@pytest.mark.parametrize("missing", FILES.values())
def test_a_missing_file_is_named_with_the_three_ways_to_get_it(squad_dir, tmp_path, missing):
    for file in FILES.values():
        if file != missing:
            (tmp_path / file).write_bytes((squad_dir / file).read_bytes())
    with pytest.raises(UserError, match=rf"(?s){missing} is not there.*rajpurkar/squad.*HF_HOME.*--data-dir"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "start"), [("good", 4), ("good", -9), ("Good", 3), ("film", 700), ("", 3), (" ", 2), ("film.", 8)]
)
def test_an_answer_that_does_not_stand_where_it_should_is_not_taught_but_counts_in_scores(
    tmp_path, tokenizer, text, start, capsys
):
    train = one()
    train["data"] += one(text=text, start=start, id="r")["data"]
    written(tmp_path, train, "train-v1.1.json")
    written(tmp_path, one(text=text, start=start))
    task, store, evals = load(tmp_path, tokenizer)
    assert "1 of 2 training questions left out" in capsys.readouterr().out
    assert (len(store), len(evals)) == (1, 1)
    assert task.compute_metrics({"validation": np.zeros((int(evals.lengths.sum()), 2))}, {})["exact_match"] == 0
    task.predict = lambda logits: {"q": text}
    assert task.compute_metrics({"validation": None}, {})["exact_match"] == 1


def test_the_first_answer_that_stands_is_taught(tmp_path, tokenizer):
    answers = [{"text": "good", "answer_start": 4}, {"text": "film", "answer_start": 8}, {"text": "good", "answer_start": 3}]
    for file in FILES.values():
        written(tmp_path, one(answers=answers), file)
    _, store, _ = load(tmp_path, tokenizer)
    (first, last), ids = store.labels[0].tolist(), store.batch(torch.tensor([0])).input_ids[0]
    assert tokenizer.decode(ids[first : last + 1]) == "film"


def test_answers_within_words_are_counted_and_those_of_no_token_left_out(tmp_path, tokenizer, capsys):
    train = one(context="a good film \u200b", text="oo", start=3)
    train["data"] += one(context="a good film \u200b", text="\u200b", start=12, id="r")["data"]
    written(tmp_path, train, "train-v1.1.json")
    written(tmp_path, one())
    _, store, _ = load(tmp_path, tokenizer)
    out = capsys.readouterr().out
    assert "1 of 2 training questions are left out of training, as their answers cover no token: r" in out
    assert "1 of 2 training questions are taught with answers that begin or end within a token" in out
    assert len(store) == 1


def test_with_nothing_to_learn_the_run_ends_in_words(tmp_path, tokenizer):
    for file in FILES.values():
        written(tmp_path, one(start=1), file)
    with pytest.raises(UserError, match="none of SQuAD's training questions"):
        load(tmp_path, tokenizer)


# ---- limits, fingerprints ----


def test_limits_are_of_questions_and_the_same_for_every_seed(squad_dir, tokenizer):
    task, whole, evals = load(squad_dir, tokenizer)
    stores = [load(squad_dir, tokenizer, limit_train=8, seed=seed)[1] for seed in (1, 2)]
    assert stores[0].sha256 == stores[1].sha256 != whole.sha256
    assert 8 <= len(stores[0]) < len(whole)
    few, _, first = load(squad_dir, tokenizer, limit_eval=5)
    assert [q.id for q in few.asked] == [f"q{n}" for n in range(5)]
    assert first.lengths.tolist() == evals.lengths[: len(first)].tolist()
    assert len(task.asked) == 20
    assert set(task.windows["question"]) == set(range(20))


def test_gold_answers_bear_on_the_evaluation_sets_fingerprint(tmp_path, tokenizer):
    prints = set()
    for text, start in (("good", 3), ("film", 8)):
        written(tmp_path, one(), "train-v1.1.json")
        written(tmp_path, one(text=text, start=start))
        prints.add(load(tmp_path, tokenizer)[2].sha256)
    assert len(prints) == 2


# ---- the hub ----


def test_the_hub_gives_the_same_windows_as_the_files(squad_dir, tokenizer, monkeypatch):
    def load_dataset(name: str) -> dict:
        assert name == "rajpurkar/squad"
        splits: dict = {}
        for split, questions in read_folder(squad_dir).items():
            columns = {key: [getattr(q, key) for q in questions] for key in ("id", "question", "context")}
            golds = [dict(zip(("text", "answer_start"), map(list, zip(*q.answers, strict=True)), strict=True)) for q in questions]
            splits[split] = columns | {"title": ["A"] * len(questions), "answers": golds}
        return splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    hub, folder = load(None, tokenizer), load(squad_dir, tokenizer)
    assert [store.sha256 for store in hub[1:]] == [store.sha256 for store in folder[1:]]
    assert hub[0].asked == folder[0].asked


def test_a_hub_that_fails_points_to_the_folder(monkeypatch, tokenizer):
    def load_dataset(_: str) -> None:
        raise ConnectionError("no route to huggingface.co\nand more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"rajpurkar/squad[^\n]*: no route[^\n]*\n.*--data-dir.*train-v1\.1\.json"):
        load(None, tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(UserError, match=r"package datasets.*--data-dir"):
        load(None, tokenizer)


# ---- answers ----


def planted(task: Squad, tokenizer, golds: list[tuple[str, int]], cutting: tuple[int, int] = (100, 32)) -> np.ndarray:
    """Logits that point at each question's gold answer, in every window that has all of it."""
    made = train_windows(tokenizer, [q.question for q in task.asked], [q.context for q in task.asked], golds, *cutting)
    assert len(made["lengths"]) == len(task.windows["lengths"])
    logits = np.random.default_rng(0).normal(size=(len(made["ids"]), 2)).astype(np.float32)
    has = made["labels"].any(axis=1)
    starts = np.cumsum(made["lengths"]) - made["lengths"]
    for side in (0, 1):
        logits[(starts + made["labels"][:, side])[has], side] += 30
    return logits


def test_planted_gold_answers_are_read_back_whichever_of_them_and_score_1(squad_dir, tokenizer):
    task, _, evals = load(squad_dir, tokenizer)
    for choose in (0, -1):
        golds = [q.answers[choose] for q in task.asked]
        logits = planted(task, tokenizer, golds)
        assert task.decode(logits) == {q.id: text for q, (text, _) in zip(task.asked, golds, strict=True)}
        assert task.compute_metrics({"validation": logits}, {"validation": evals}) == {"f1": 1.0, "exact_match": 1.0}


def test_scores_of_wrong_answers_by_hand(tmp_path, tokenizer):
    paragraphs = []
    for number, golds in enumerate([["good film"], ["good", "film was"], ["plot"], ["song"]]):
        context = "the good film was a plot song"
        answers = [{"text": gold, "answer_start": context.index(gold)} for gold in golds]
        paragraphs.append({"context": context, "qas": [{"id": f"q{number}", "question": "what?", "answers": answers}]})
    for file in FILES.values():
        written(tmp_path, {"data": [{"paragraphs": paragraphs}]}, file)
    task, _, evals = load(tmp_path, tokenizer)
    context = "the good film was a plot song"
    said = ["the good", "good film was", "a plot", "was"]
    logits = planted(task, tokenizer, [(text, context.index(text)) for text in said])
    # words "good" of "good film"; "good film was" of "film was"; the article does not count; nothing in common
    expected = {"f1": (2 / 3 + 4 / 5 + 1 + 0) / 4, "exact_match": 1 / 4}
    assert task.compute_metrics({"validation": logits}, {"validation": evals}) == pytest.approx(expected)


def test_questions_without_an_answer_are_counted(tmp_path, tokenizer, capsys):
    for file in FILES.values():
        written(tmp_path, one(question="good " * 30), file)
    task, _, evals = load(tmp_path, tokenizer)
    logits = np.zeros((int(evals.lengths.sum()), 2), np.float32)
    logits[1:31] = 9  # the question's tokens are likelier than any of the context
    assert task.decode(logits) == {"q": ""}
    assert "1 of 1 questions are left without an answer" in capsys.readouterr().out


def test_check_hands_evaluate_the_answers(squad_dir, tokenizer, monkeypatch):
    asked = put_evaluate(monkeypatch, {"exact_match": 100.0, "f1": 100.0})
    task, _, evals = load(squad_dir, tokenizer, limit_eval=2)
    task.predict = lambda logits: {q.id: q.answers[0][0] for q in task.asked}
    assert "equal" in task.compare_with_evaluate({"validation": None}, {"validation": evals}, {"f1": 1.0, "exact_match": 1.0})
    first = task.asked[0]
    assert asked[0] == ("squad",)
    assert asked[1]["predictions"][0] == {"id": "q0", "prediction_text": first.answers[0][0]}
    assert asked[1]["references"][0] == {
        "id": "q0",
        "answers": {"text": [text for text, _ in first.answers], "answer_start": [at for _, at in first.answers]},
    }
    with pytest.raises(UserError, match=r"f1 is 1\.0 by evaluate and 0\.5 here"):
        task.compare_with_evaluate({"validation": None}, {"validation": evals}, {"f1": 0.5, "exact_match": 1.0})


# ---- the network ----


@pytest.fixture
def net(bert_dir):
    return Squad().load_net(Config(task="squad", model=str(bert_dir)))[0]


def store_of(lengths: list[int]) -> TokenStore:
    rng = np.random.default_rng(len(lengths))
    ids, types_ = ([rng.integers(low, high, n).tolist() for n in lengths] for low, high in ((5, 100), (0, 2)))
    return TokenStore(Tokens.of(ids, types_), np.stack([rng.integers(0, n, 2) for n in lengths]))


def test_labels_of_a_batch_are_its_windows(tmp_path):
    store = store_of([5, 9, 7])
    batch = store.batch(torch.tensor([2, 0]))
    assert batch.labels.tolist() == store.labels[[2, 0]].tolist()
    assert batch.labels.dtype == torch.int64
    assert store_of([5, 9, 7]).sha256 == store.sha256


def test_the_packed_loss_and_its_gradients_equal_hugging_faces(net):
    """Of windows of one length: where they differ, Hugging Face's softmax counts the padding."""
    store, examples = store_of([40] * 5), torch.tensor([3, 0, 4, 1, 2])
    net = net.double().eval()
    batch = store.batch(examples)
    loss = Squad().loss(net, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    net.set_attn_implementation("eager")
    padded = {key: getattr(batch, key).view(5, 40) for key in ("input_ids", "token_type_ids")}
    padded |= dict(zip(("start_positions", "end_positions"), batch.labels.T, strict=True))
    expected = net(**padded, attention_mask=torch.ones(5, 40)).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("spare", [0, 5])
def test_the_loss_is_the_mean_over_each_windows_own_tokens(monkeypatch, spare):
    lengths = [3, 17, 9, 1]
    batch = store_of(lengths).batch(torch.arange(4))
    batch = dataclasses.replace(batch, longest=batch.longest + spare)
    hidden = torch.randn(30 + spare, 8, requires_grad=True)  # the last ones belong to no window
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


def test_logits_are_in_float32_under_autocast(net):
    batch = store_of([9, 4]).batch(torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert Squad().predict(net, batch).dtype == torch.float32
        assert Squad().loss(net, batch).dtype == torch.float32


def test_the_pooler_is_the_checkpoints_frozen_and_prunable(net, bert_dir):
    from safetensors.torch import load_file

    assert torch.equal(net.bert.pooler.dense.weight, load_file(bert_dir / "model.safetensors")["pooler.dense.weight"])
    assert not net.bert.pooler.dense.weight.requires_grad
    assert len(prunable(net)) == 2 * 6 + 1
    assert net.qa_outputs.out_features == 2


# ---- runs ----


@pytest.fixture
def run_squad(bert_dir, squad_dir, tmp_path, monkeypatch):
    """`lt_squad.py` in this process with small settings: (run, results)."""
    monkeypatch.chdir(tmp_path)

    def go(*extra):
        argv = f"--model {bert_dir} --data-dir {squad_dir} --max-length 100 --doc-stride 32 --batch-size 16 --lr 1e-3"
        argv += "" if "--mask" in extra else " --levels 2 --rate 0.3"
        cfg = parse("squad", None, [*argv.split(), *map(str, extra)])
        lt_squad.main(cfg)
        run = Run(cfg, "squad")
        return run, run.results()

    return go


def test_a_run_finds_tickets_and_is_repeated_to_the_bit(run_squad, capsys):
    run, results = run_squad("--limit-train", "20")
    assert [result["sparsity"] for result in results] == pytest.approx([0, 0.3], abs=1e-3)
    assert results[0]["task"] == "squad"
    assert results[0]["metric"] == "f1"
    assert set(results[0]["metrics"]) == {"f1", "exact_match"}
    assert all(0 <= value <= 1 for result in results for value in result["metrics"].values())
    pooler = Mask.load(run.level_dir(1) / "mask.safetensors")["bert.pooler.dense.weight"]
    assert pooler.shape == (32, 32)
    assert run.dir.name.startswith("squad-imp-s57-")
    assert "f1 - dense" in capsys.readouterr().out
    assert run_squad("--limit-train", "20", "--output-dir", "again")[1] == results


def test_a_level_learns(run_squad):
    _, results = run_squad("--levels", "1", "--epochs", "12", "--lr", "5e-3", "--log-every", "4")
    assert results[0]["losses"][-1][1] < 0.8 * results[0]["losses"][0][1]


def test_a_ticket_is_trained_once(run_squad, net):
    oneshot(net, 0.5, "magnitude", 0).write("m.safetensors")
    _, results = run_squad("--mask", "m.safetensors", "--max-steps", "2")
    assert [result["sparsity"] for result in results] == [0.5]


# ---- the published file ----


def word_tokenizer(texts: set[str]) -> BertTokenizerFast:
    """An uncased tokenizer that knows every word of these texts."""
    cut, words = pre_tokenizers.BertPreTokenizer(), dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    for text in sorted(texts):
        words |= dict.fromkeys(word for word, _ in cut.pre_tokenize_str(normalizers.BertNormalizer().normalize_str(text)))
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), cut
    return BertTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.realdata
def test_every_gold_answer_of_the_published_file_survives_or_is_counted(request):
    """A gold answer of whole words, `LONGEST` at most, scores 1 where its tokens are the likeliest; the others are few."""
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
    assert made["lost"].size == 0
    assert set(made["question"][has]) == set(range(len(golds)))
    assert made["inexact"].size == 75  # of 18,216: "gold" of "golden"

    short = made["question"][has & (made["labels"] @ [-1, 1] < LONGEST)]
    whole: dict[str, tuple[str, int]] = {}
    for i in sorted(set(short) - set(made["inexact"])):
        whole.setdefault(golds[i][0].id, golds[i][1])
    task = Squad()
    task.asked = [q for q in asked if q.id in whole]
    assert len(task.asked) == 10_570 - 1
    task.windows = eval_windows(tokenizer, [q.question for q in task.asked], [q.context for q in task.asked], 384, 128)
    logits = planted(task, tokenizer, list(whole.values()), (384, 128))
    assert task.decode(logits) == {question: text.strip() for question, (text, _) in whole.items()}
    assert task.compute_metrics({"validation": logits}, {}) == {"f1": 1.0, "exact_match": 1.0}
