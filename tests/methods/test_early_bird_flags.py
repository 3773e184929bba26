"""The flags of EarlyBERT, its presets, and where the released code differs (Chen et al. 2021)."""

import json

import numpy as np
import pytest
import torch
from trainrun import train

from bert_tickets.cli import parse
from bert_tickets.errors import Diverged, UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import read_units
from bert_tickets.runs.directory import results
from bert_tickets.training.step import Step

GLUE = "lt_glue.py"


def settings(kind="glue", *more):
    task = ["--task", "qnli"] if kind == "glue" else []
    return parse(kind, None, [*task, "--method", "early-bird", *more])


def found(commands, folder, *more, script=GLUE):
    own = ["--method", "early-bird", "--draw-at", "4", "--batch-size", "8", "--search-lr", "1e-2", "--lr", "1e-2"]
    return train(script, [*commands[script], *own, "--output-dir", folder, *more])


def units_of(run, level=1):
    return read_units(Mask.load(run / f"level_0{level}" / "mask.safetensors"))


def record_of(run):
    return np.load(run / "level_00" / "coefficients.npy")


# ---- presets ----

COMMON = {"heads": "1/3", "neurons": 0.4, "neuron_scope": "global", "rank": "magnitude", "rule": "count", "record": "after"}
COMMON |= {"lambda_heads": 1e-4, "lambda_neurons": 1e-4, "draw_at": "0.2", "draw_when": "fixed", "keep_gates": False}
COMMON |= {"whole_search": False, "skip_first_batch": False, "ticket": "early-bird", "execution": "slim", "record_epochs": 1.0}
RELEASED = {"heads": "0.333333", "rank": "signed", "rule": "quantile", "keep_gates": True, "whole_search": True}


def test_presets_are_the_papers():
    glue, squad, mlm = (settings(kind) for kind in ("glue", "squad", "mlm"))
    for cfg, own in ((glue, {}), (squad, {}), (mlm, {"neurons": 0.3, "draw_at": "400"})):
        assert {name: getattr(cfg.settings, name) for name in COMMON} == COMMON | own
    of = {name: (cfg.train.lr, cfg.train.epochs, cfg.train.batch_size, cfg.settings.search_lr, cfg.settings.search_epochs)
          for name, cfg in {"glue": glue, "squad": squad}.items()}  # fmt: skip
    assert of == {"glue": (4e-5, 2.0, 128, 2e-5, 3.0), "squad": (3e-5, 3.0, 48, 3e-5, 2.0)}
    assert (mlm.train.max_steps, mlm.train.lr, mlm.settings.search_lr, mlm.settings.search_epochs) == (10_000, 5e-5, 5e-5, None)
    assert (glue.max_length, squad.max_length, squad.doc_stride) == (128, 384, 128)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("glue", RELEASED | {"record": "before"}),
        ("squad", RELEASED | {"record_epochs": 2.0, "skip_first_batch": True}),
        ("mlm", {}),  # was never released
    ],
)
def test_the_released_code_differs_as_documented(kind, own):
    paper, released = settings(kind), settings(kind, "--protocol", "released")
    assert paper.train == released.train
    assert {name: value for name, value in vars(released.settings).items() if value != vars(paper.settings)[name]} == own


# ---- what each flag does ----


@pytest.fixture(scope="module")
def plain(commands, tmp_path_factory):
    """A run with the paper's settings. No test changes it."""
    return found(commands, tmp_path_factory.mktemp("runs"))


def test_a_draw_before_the_update_reads_the_coefficients_one_step_earlier(commands, plain, tmp_path):
    """Of the first step these are 1, and the earlier units go, or all of them."""
    before = found(commands, tmp_path, "--record", "before")
    third = found(commands, tmp_path, "--draw-at", "3")
    assert np.array_equal(record_of(before), record_of(plain))  # the record is the same
    assert units_of(before) == units_of(third) != units_of(plain)
    assert results(before)[0]["draw"]["step"] == 4
    first = units_of(found(commands, tmp_path, "--record", "before", "--draw-at", "1"))
    assert first["heads"].tolist() == [[False, True, True, True]] * 2
    assert first["neurons"].flatten().tolist() == [False] * 51 + [True] * 77
    assert units_of(found(commands, tmp_path, "--record", "before", "--draw-at", "1", "--rule", "quantile")).kept == 0


def test_the_quantile_rule_removes_one_more_head(commands, plain, tmp_path):
    """1 + floor(1/3 * 3) of 4, and of neurons 1 + floor(0.4 * 127) of 128."""
    units = units_of(found(commands, tmp_path, "--rule", "quantile"))
    assert [int((~kept).sum()) for kept in units["heads"]] == [2, 2]
    assert int((~units["neurons"]).sum()) == 51
    assert [int((~kept).sum()) for kept in units_of(plain)["heads"]] == [1, 1]
    fewer = found(commands, tmp_path, "--rule", "quantile", "--heads", "0.333333")
    assert [int((~kept).sum()) for kept in units_of(fewer)["heads"]] == [1, 1]


def test_neurons_are_ranked_by_layer_or_over_all(commands, plain, tmp_path):
    by_layer = units_of(found(commands, tmp_path, "--neuron-scope", "layer"))
    assert [int((~kept).sum()) for kept in by_layer["neurons"]] == [26, 26]
    assert int((~units_of(plain)["neurons"]).sum()) == 51
    assert len({int(kept.sum()) for kept in units_of(plain)["neurons"]}) == 2


def test_negative_coefficients_go_first_if_they_are_ranked_by_value(commands, tmp_path):
    """A learning rate that brings some below zero."""
    runs = [found(commands, tmp_path, "--search-lr", "1", "--rank", rank) for rank in ("magnitude", "signed")]
    row = torch.from_numpy(record_of(runs[0])[3])
    assert (row < 0).any()
    for run, scores in zip(runs, (row.abs(), row), strict=True):
        heads = scores[:8].view(2, 4)
        assert torch.equal(units_of(run)["heads"], heads > heads.min(1, keepdim=True).values)
    assert units_of(runs[0]) != units_of(runs[1])


def test_each_penalty_lowers_its_coefficients(commands, plain, tmp_path):
    means = {}
    for name, words in {"plain": (), "heads": ("--lambda-heads", "1"), "neurons": ("--lambda-neurons", "1")}.items():
        row = record_of(found(commands, tmp_path, *words) if words else plain)[-1]
        means[name] = row[:8].mean(), row[8:].mean()
    assert means["heads"][0] < means["plain"][0] - 0.01
    assert means["neurons"][1] < means["plain"][1] - 0.01


def test_the_search_has_its_own_learning_rate_and_horizon(commands, tmp_path):
    """The first updates of AdamW are the learning rate; the level's own is another."""
    given = ["--lr", "1e-3", "--log-every", "1"]
    runs = [found(commands, tmp_path, "--search-epochs", epochs, *given) for epochs in ("1", "2")]
    for run, horizon in zip(runs, (6, 12), strict=True):  # 44 examples by 8
        lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
        rates = {level: [line["lr"] for line in lines if line["level"] == level] for level in (0, 1)}
        assert rates[0] == pytest.approx([1e-2 * (1 - step / horizon) for step in range(4)])
        assert rates[1] == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])
        assert abs(record_of(run)[0] - 1) == pytest.approx(1e-2, rel=1e-2)


def test_a_whole_search_goes_on_and_draws_the_same_ticket(commands, plain, tmp_path):
    whole = found(commands, tmp_path, "--whole-search", "--record-epochs", "1.5", "--draw-every", "1")
    assert (len(record_of(whole)), results(whole)[0]["steps"]) == (9, 9)
    assert np.array_equal(record_of(whole)[:4], record_of(plain))
    assert units_of(whole) == units_of(plain)
    assert results(whole)[0]["draw"]["step"] == 4
    assert results(whole)[1]["losses"] == results(plain)[1]["losses"]
    shorter = found(commands, tmp_path, "--whole-search", "--record-epochs", "0.1")
    assert len(record_of(shorter)) == 4  # the draw's own step at least


@pytest.mark.parametrize("execution", ["slim", "masked"])
def test_gates_that_are_kept_are_trained_from_one_without_penalty_and_folded(commands, tmp_path, execution):
    """The weights that are written compute what was evaluated, without gates."""
    given = ["--task", "stsb", "--execution", execution, "--lambda-heads", "5", "--lambda-neurons", "5", "--heads", "0.25"]
    run, without = found(commands, tmp_path, "--keep-gates", *given), found(commands, tmp_path, *given)
    kept, plain = results(run)[1], results(without)[1]
    assert (kept["mask_sha256"], kept["flops"]) == (plain["mask_sha256"], plain["flops"])
    assert kept["losses"][0][1] < 20 < results(run)[0]["losses"][0][1]  # without the penalty
    assert kept["losses"] != plain["losses"]
    words = [word for at, word in enumerate(commands[GLUE]) if not {commands[GLUE][at - 1], word} & {"--lr", "--max-steps"}]
    files = [run / "level_01" / f"{name}.safetensors" for name in ("mask", "weights")]
    score = ["--task", "stsb", "--score", "--mask", files[0], "--weights", files[1]]
    (line,) = results(train(GLUE, [*words, *score, "--output-dir", tmp_path]))
    assert line["metrics"] == pytest.approx(kept["metrics"], abs=1e-5)


def test_the_first_batch_of_the_training_is_left_out(commands, plain, tmp_path):
    run = found(commands, tmp_path, "--skip-first-batch", "--log-every", "1")
    steps = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["level"] == 1] == [2, 3, 4, 5, 6]
    skipped, whole = results(run)[1], results(plain)[1]
    assert (skipped["steps"], whole["steps"]) == (5, 6)
    assert skipped["flops"] < whole["flops"]
    assert results(run)[0]["steps"] == results(plain)[0]["steps"]


def test_slim_and_masked_training_end_alike_without_dropout(commands, calm_bert_dir, tmp_path):
    runs = [
        found(commands, tmp_path, "--model", calm_bert_dir, "--execution", name, "--lr", "1e-3") for name in ("slim", "masked")
    ]
    slim, masked = (results(run)[1] for run in runs)
    assert np.allclose(slim["losses"], masked["losses"], atol=1e-5)
    assert slim["metrics"] == pytest.approx(masked["metrics"], abs=1e-5)
    assert slim["init_sha256"] == masked["init_sha256"]
    assert ("removed" in slim, "removed" in masked) == (True, False)


# ---- settings ----


class Examples:
    """What the step of a draw depends on: a number of examples and the size of a batch."""

    def __init__(self, count, size):
        self.store, self.batch_size = range(count), size

    @property
    def batches(self):
        return self


def test_the_draw_is_after_a_step_or_a_part_of_an_epoch():
    """A fifth of QNLI's 104,743 examples by 128 is step 164."""
    steps = {
        at: settings("glue", "--draw-at", at).settings.draw_step(Examples(104_743, 128)) for at in ("0.2", "1", "400", "1e-9")
    }
    assert steps == {"0.2": 164, "1": 1, "400": 400, "1e-9": 1}
    assert settings("glue", "--draw-at", "0.20").settings == settings("glue").settings


def test_equal_fractions_have_equal_text():
    texts = {given: settings("glue", "--heads", given).settings.heads for given in ("1/3", "2/6", "0.25", "1/4", ".333333", "0")}
    assert texts == {"1/3": "1/3", "2/6": "1/3", "0.25": "0.25", "1/4": "0.25", ".333333": "0.333333", "0": "0"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--draw-at 0", "give a step such as 400"),
        ("--draw-at 1.5", "give a step such as 400"),
        ("--draw-at 1.0", "give a step such as 400"),
        ("--draw-at soon", "give a step such as 400"),
        ("--heads 4/3", "give a fraction such as 1/3"),
        ("--heads 1/0", "give a fraction such as 1/3"),
        ("--heads 1e-99999999", "give a fraction such as 1/3"),
        ("--neurons 1.1", "from 0 to 1"),
        ("--lambda-heads -1", "at least 0"),
        ("--search-lr 0", "above 0"),
        ("--draw-every 0", "above 0"),
        ("--draw-when stable --draw-at 9", "--draw-at has no effect with --draw-when stable"),
        ("--record-epochs 2", "--record-epochs has no effect without --whole-search or --draw-when stable"),
        ("--ticket random --draw-at 9", "--draw-at has no effect with --ticket random"),
        ("--ticket full --rank signed", "--rank has no effect with --ticket full"),
        ("--ticket full --keep-gates", "--keep-gates has no effect with --ticket full"),
        ("--ticket random --search-lr 1", "--search-lr has no effect with --ticket random"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(given, message, capsys):
    with pytest.raises(SystemExit) as refused:
        settings("glue", *given.split())
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_a_draw_after_the_learning_rate_is_zero_is_refused(commands, tmp_path):
    with pytest.raises(UserError, match="--draw-at 99 is step 99, and the search has 18 until its learning rate is zero"):
        found(commands, tmp_path, "--draw-at", "99")


def test_coefficients_that_are_not_finite_end_the_search_at_the_next_question(commands, tmp_path, monkeypatch):
    plain = Step.__call__

    def breaking(self, batch, lr):
        loss = plain(self, batch, lr)
        self.params["coefficient.heads"].data[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(Step, "__call__", breaking)
    words = ["--method", "early-bird", "--batch-size", "8", "--draw-when", "stable", "--draw-every", "1", "--log-every", "99"]
    with pytest.raises(Diverged, match="infinite or NaN by step 1"):
        train(GLUE, [*commands[GLUE], *words, "--output-dir", tmp_path])


def test_a_ticket_without_a_step_of_training_is_refused(commands, tmp_path):
    with pytest.raises(UserError, match="--skip-first-batch: the ticket's training has one step, and nothing"):
        found(commands, tmp_path, "--skip-first-batch", "--max-steps", "1", "--draw-at", "1")


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ("", ["level 0: search, and draw after 0.2 of an epoch: without 33% of each layer's heads, 40% of the neurons"]),
        ("--draw-at 9 --heads 0", ["draw after step 9: without 0% of", "level 1: train the ticket"]),
        ("--draw-when stable", ["draw when the masks are stable"]),
        ("--ticket random", ["level 0: draw a random ticket"]),
        ("--ticket full", ["level 1: train the full network for the arithmetic of a slim ticket"]),
    ],
)
def test_the_plan_says_what_each_level_does(given, lines):
    plan = "\n".join(settings("glue", *given.split()).settings.plan())
    assert all(line in plan for line in lines)
