"""The flags of mask training, what its presets set, and how its runs end."""

import json

import pytest
from trainrun import train

from bert_tickets.cli import parse
from bert_tickets.errors import Diverged, UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.straight_through import refresh
from bert_tickets.methods.oneshot import ranked
from bert_tickets.modeling.loading import load_bert
from bert_tickets.runs.directory import failure, level_dir, results
from bert_tickets.training.step import Step


def settings(*more):
    return parse("mlm", None, ["--method", "mask-training", *more])


def words(objective="mlm", *more):
    steps = "--refresh 2 --save-masks 2 --max-steps 6 --save-steps 1"
    return [*f"--method mask-training --sparsity 0.5 --objective {objective} {steps}".split(), *more]


def test_presets_are_the_papers_and_the_released_code_differs_as_documented():
    mlm, kd, both = (settings("--sparsity", "0.7", "--objective", name) for name in ("mlm", "kd", "mlm+kd"))
    released = settings("--sparsity", "0.7", "--objective", "kd", "--protocol", "released")
    for cfg in (mlm, both):
        assert (cfg.train.lr, cfg.train.weight_decay, cfg.settings.optimizer, cfg.settings.refresh) == (5e-5, 0, "adamw", 1000)
    assert (kd.train.lr, kd.train.weight_decay, kd.train.adam_epsilon) == (2e-5, 0.01, 1e-6)
    assert (kd.settings.optimizer, kd.settings.refresh) == ("bert_adam", 100)
    for cfg in (mlm, kd, both, released):
        assert (cfg.train.batch_size, cfg.max_length, cfg.train.max_steps, cfg.settings.ticket_step) == (16, 512, 27920, 17000)
    differs = {key for key, value in vars(released.settings).items() if value != getattr(kd.settings, key)}
    assert differs == {"teacher_dropout", "kd_padding", "rounding", "refresh_early"}
    steps = {s: settings("--sparsity", s).settings.ticket_step for s in ("0.2", "0.5", "0.9", "0.55")}
    assert steps == {"0.2": 3000, "0.5": 11000, "0.9": 22000, "0.55": None}


def test_the_released_kd_refreshes_and_saves_a_step_early(of_documents, tmp_path):
    more = ["--protocol", "released", "--refresh", "3", "--save-masks", "6", "--max-steps", "8", "--ticket-step", "7"]
    run = train("lt_pretrain.py", [*of_documents, *words("kd"), *more, "--output-dir", tmp_path])
    (line,) = results(run)
    assert [record["step"] for record in line["refreshes"]] == [1, 2, 5, 6]
    assert [path.name for path in (run / "masks").iterdir()] == ["step_0000005.safetensors"]
    assert line["steps"] == 6
    assert json.loads((run / "run.json").read_text())["config"]["kd_padding"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--sparsity 1", "between 0 and 1"),
        ("--sparsity 0.5 --save-masks 1500", "multiples of --refresh"),
        ("--sparsity 0.5 --save-masks often", "a number of steps"),
        ("--sparsity 0.5 --refresh 0", "at least 1"),
        ("--sparsity 0.5 --kd-padding", "no effect with --objective mlm"),
        ("--sparsity 0.5 --eval-steps 5", "evaluated where it is saved"),
        ("--sparsity 0.5 --kd-padding --objective mlm+kd", "no effect with --objective mlm+kd"),
        ("--sparsity 0.5 --ticket-step 1 --refresh-early", "nothing would be trained"),
        ("--score --mask m --lr 1e-4", "trains nothing"),
        ("--score --mask m --weights w --init random", "--init has no effect with --weights"),
    ],
)
def test_flags_that_make_no_sense_are_refused(given, message, capsys):
    with pytest.raises((SystemExit, UserError)):
        settings(*given.split())
    assert message in capsys.readouterr().err


def test_the_start_is_rounded_as_the_refreshes_are(of_documents, bert_dir, tmp_path):
    scores = ranked(load_bert(str(bert_dir), "mlm", "pretrained", 57)[0], "magnitude", 57, "matrices+embeddings")
    starts = {rounding: refresh(scores, 0.35, rounding)[0] for rounding in ("round", "int")}
    assert starts["round"] != starts["int"]
    for rounding, start in starts.items():
        given = ["--sparsity", "0.35", "--rounding", rounding, "--lr", "1e-30", "--weight-decay", "0", "--output-dir", tmp_path]
        run = train("lt_pretrain.py", [*of_documents, *words("kd"), *given])
        assert Mask.load(level_dir(run, 0) / "mask.safetensors") == start
        assert all(record["from_start"] == 0 for record in results(run)[0]["refreshes"])


def test_scores_that_are_not_finite_end_the_level_at_the_next_refresh(of_documents, tmp_path, monkeypatch):
    plain = Step.__call__

    def breaking(self, batch, lr):
        loss = plain(self, batch, lr)
        next(iter(self.params.values())).data.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(Step, "__call__", breaking)
    with pytest.raises(Diverged, match="infinite or NaN by step 2"):
        train(
            "lt_pretrain.py", [*of_documents, *words("mlm", "--log-every", "99", "--save-steps", "99", "--output-dir", tmp_path)]
        )
    (run,) = tmp_path.iterdir()
    assert failure(run)["ended"] == "a weight became infinite or NaN by step 2"


def test_a_ticket_after_the_last_step_is_the_last_ones_with_a_warning(of_documents, tmp_path):
    for step in ("5", "7"):
        run = train("lt_pretrain.py", [*of_documents, *words("kd", "--ticket-step", step, "--output-dir", tmp_path)])
        (line,) = results(run)
        late = [text for text in line["warnings"] if "--ticket-step" in text]
        assert (line["steps"], late) == {
            "5": (5, []),
            "7": (6, ["--ticket-step 7 is after the last step: the ticket is that of step 6"]),
        }[step]
