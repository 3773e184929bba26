"""Runs of EarlyBERT: search, draw and training, killed and resumed (Chen et al. 2021)."""

import copy
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from trainrun import Killed, Runs, contents, dying, train

from bert_tickets.errors import Stopped, UserError
from bert_tickets.files import read_tensors, sha256_of
from bert_tickets.masking.draw import draw, first_stable
from bert_tickets.masking.mask import Mask
from bert_tickets.methods import early_bird
from bert_tickets.modeling import parameters
from bert_tickets.modeling.flops import forward_flops
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights, head_weights
from bert_tickets.modeling.units import read_units
from bert_tickets.runs import session
from bert_tickets.runs.directory import results
from bert_tickets.runs.integrity import problems
from bert_tickets.training import coefficients
from bert_tickets.training.coefficients import GatedNetwork

GLUE, MLM = "lt_glue.py", "lt_pretrain.py"
SHAPES = {"heads": (2, 4), "neurons": (2, 64)}  # of the small BERT


SEARCH = ["--search-lr", "1e-2"]


def found(commands, folder, *more, script=GLUE):
    own = ["--method", "early-bird", "--batch-size", "8", "--output-dir", folder]
    return train(script, [*commands[script], *own, *more])


def units_of(run, level=1):
    return read_units(Mask.load(run / f"level_0{level}" / "mask.safetensors"))


def record_of(run):
    return np.load(run / "level_00" / "coefficients.npy")


def drawn(row, **own):
    """The units of a row of the record by the paper's rule."""
    parts = torch.from_numpy(np.array(row)).split([8, 128])
    given = {kind: part.view(shape) for part, (kind, shape) in zip(parts, SHAPES.items(), strict=True)}
    return draw(given, {"heads": 1 / 3, "neurons": 0.4}, {"heads"}, **({"rank": "magnitude", "rule": "count"} | own))


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    """A run that keeps its models. No test changes it."""
    return found(commands, tmp_path_factory.mktemp("runs"), *SEARCH, "--draw-at", "4", "--keep-models")


def test_a_run_searches_draws_and_trains_the_ticket_from_theta_0_and_gamma(run, bert_dir):
    search, training = results(run)
    first, second = (Mask.load(run / f"level_0{level}" / "mask.safetensors") for level in (0, 1))
    units, rows = read_units(first), record_of(run)
    assert (first, first.info["units"], first.info["heads"]) == (second, "heads+neurons", 4)
    assert [int(row.sum()) for row in units["heads"]] == [3, 3]
    assert int(units["neurons"].sum()) == 128 - round(0.4 * 128)
    assert (search["steps"], training["steps"], training["removed"]) == (4, 6, {"heads": 2, "neurons": 51})
    assert (rows.shape, rows.dtype) == ((4, 8 + 128), np.float32)
    assert units == drawn(rows[3]) != drawn(rows[0])
    assert search["draw"] == {"step": 4, "fired": None, "heads_fired": None, "neurons_fired": None}
    theta = load_bert(str(bert_dir), "classifier", "pretrained", 57)[0]
    first.apply(dict(theta.named_parameters()))
    assert search["init_sha256"] == training["init_sha256"] == sha256_of(encoder_weights(theta))
    kept = load_file(run / "level_00" / "model" / "model.safetensors")  # the ticket before its training
    for name, p in [*encoder_weights(theta).items(), *head_weights(theta).items()]:
        assert np.array_equal(kept[name], p.detach()), name
    assert (search["sizes"]["heads_kept"], search["sizes"]["neurons_kept"]) == (6, 77)
    assert problems(run) == []
    assert not (run / "coefficients.part").exists()


def test_the_searchs_metrics_are_those_of_the_gated_network_that_was_trained(commands, tmp_path, monkeypatch):
    """Also within the level. What is written is theta_0."""
    gated, expected, search, rewind = [], [], early_bird.search, parameters.rewind

    class Kept(GatedNetwork):
        def __init__(self, *given):
            super().__init__(*given)
            gated.append(self)

    def rewinding(net, *given):
        folded, (own,) = copy.deepcopy(net).eval(), sessions
        Kept(folded).coefficients = gated[0].coefficients
        gated[1].fold()
        expected.append(own.evaluate(lambda batch: own.task.predict(folded, batch)))
        rewind(net, *given)

    def searching(given, s):
        sessions.append(given)
        search(given, s)

    sessions = []
    monkeypatch.setattr(coefficients, "GatedNetwork", Kept)
    monkeypatch.setattr(parameters, "rewind", rewinding)
    monkeypatch.setattr(early_bird, "search", searching)
    line, _ = results(found(commands, tmp_path, "--search-lr", "0.1", "--draw-at", "2", script=MLM))
    assert line["metrics"] == pytest.approx(expected[0], rel=1e-5)
    monkeypatch.undo()
    longer, _ = results(found(commands, tmp_path, "--search-lr", "0.1", "--draw-at", "4", "--eval-steps", "2", script=MLM))
    assert longer["evaluations"][0]["metrics"] == line["metrics"] != longer["metrics"]


def test_the_arithmetic_is_that_of_the_steps_and_their_examples(commands, run, tmp_path):
    """Both levels read the same first examples; the full network trains as long as the ticket and its search cost."""
    search, training = results(run)
    assert search["flops"] == search["full_flops"]
    assert 0.5 < training["flops"] / training["full_flops"] < 0.8
    masked = results(found(commands, tmp_path, "--draw-at", "4", "--execution", "masked"))[1]
    assert masked["flops"] == masked["full_flops"] == training["full_flops"]
    same = results(found(commands, tmp_path, "--draw-at", "4", "--max-steps", "4"))
    assert same[0]["flops"] == same[1]["full_flops"]
    nothing, matched = results(found(commands, tmp_path, "--draw-at", "4", "--ticket", "full"))
    budget = search["flops"] + training["flops"]
    assert (nothing["steps"], nothing["flops"], matched["sparsity"]) == (0, 0, 0)
    assert 0.8 * budget < matched["flops"] == matched["full_flops"] <= budget
    assert matched["steps"] == 8  # of 4 and two thirds of 6
    more = results(found(commands, tmp_path, "--ticket", "full", "--draw-at", "5"))[1]
    assert more["steps"] == 9
    assert more["flops"] > budget
    whole = results(found(commands, tmp_path, "--protocol", "released", "--draw-at", "2", "--ticket", "full"))[1]
    assert whole["steps"] == results(found(commands, tmp_path, "--draw-at", "6", "--ticket", "full"))[1]["steps"]  # an epoch


def test_a_budget_that_no_search_has_is_refused_before_any_level(commands, tmp_path):
    with pytest.raises(UserError, match="--draw-at 99 is step 99, and the search has 18"):
        found(commands, tmp_path, "--draw-at", "99", "--ticket", "full")
    assert not list(tmp_path.glob("**/level_00"))


def test_the_closing_table_says_what_the_search_did(commands, tmp_path, capsys):
    search, training = results(found(commands, tmp_path, "--draw-at", "3"))
    said = capsys.readouterr().out
    drawn_at = "the ticket was drawn after step 3 of 3, and the masks were never stable"
    assert f"level 0 is the search, and has the metrics of its full network: {drawn_at}; " in said
    assert f"FLOPs in all, {search['flops'] / (search['flops'] + training['flops']):.0%} of them of the search" in said
    found(commands, tmp_path, "--ticket", "random")
    assert "level 0 trained nothing, and has the metrics of the network before training; " in capsys.readouterr().out


def test_a_rule_that_cannot_fire_is_refused(commands, tmp_path):
    with pytest.raises(UserError, match="compares 5 masks that are --draw-every 10 steps apart, and the search has 6 steps"):
        found(commands, tmp_path, "--draw-when", "stable")


def test_a_step_costs_three_forward_passes(commands, bert_dir, tmp_path):
    """Four of MLM, of eight blocks of sixteen tokens, of which 15 % are predicted, but for [CLS] and [SEP]."""
    search, _ = results(found(commands, tmp_path, "--draw-at", "4", script=MLM))
    net = load_bert(str(bert_dir), "mlm", "random", 0)[0]
    assert search["flops"] == 3 * forward_flops(net, np.full(4 * 8, 16), 0.15 * 4 * 8 * 14)


def test_the_full_networks_learning_rate_decays_over_its_own_steps(commands, tmp_path, capsys):
    run = found(commands, tmp_path, "--draw-at", "4", "--ticket", "full", "--log-every", "1")
    rates = [json.loads(line)["lr"] for line in (run / "train.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["0.0%"]]
    assert [row[3] for row in table] == ["-", "-"]  # level 0 trains nothing: no difference to it


def test_random_tickets_are_drawn_by_the_seed_without_a_search(commands, tmp_path):
    runs = [found(commands, tmp_path, "--ticket", "random", "--seed", seed) for seed in ("57", "58")]
    one, other = (units_of(run) for run in runs)
    assert one != other
    for units in (one, other):
        assert [int(row.sum()) for row in units["heads"]] == [3, 3]
        assert int(units["neurons"].sum()) == 77
    line = results(runs[0])[0]
    assert (line["steps"], line["flops"], line["draw"]["step"], "files" in line) == (0, 0, 0, False)
    assert one["heads"].tolist() != [[False, True, True, True]] * 2  # of equal coefficients the first ones would go


def test_a_search_ends_when_its_masks_are_stable(commands, tmp_path):
    given = ["--search-lr", "1e-4", "--batch-size", "4", "--draw-every", "2"]
    when = ["--draw-when", "stable", "--record-epochs", "3", "--log-every", "99"]
    run = found(commands, tmp_path, *given, *when)
    search, rows = results(run)[0], record_of(run)
    first = first_stable((at, drawn(rows[at - 1])) for at in range(2, len(rows) + 1, 2))
    fired = search["draw"]["fired"]
    assert first == {"all": fired, "heads": search["draw"]["heads_fired"], "neurons": search["draw"]["neurons_fired"]}
    assert fired == search["draw"]["step"] == search["steps"] == search["losses"][-1][0] == len(rows) < 33
    assert units_of(run) == drawn(rows[-1])
    whole = found(commands, tmp_path, *given, *when, "--whole-search")
    assert results(whole)[0]["draw"] == search["draw"]
    assert units_of(whole) == units_of(run)
    assert np.array_equal(record_of(whole)[:fired], rows)
    assert len(record_of(whole)) == 33
    fixed = found(commands, tmp_path, *given, "--draw-at", str(fired))
    assert results(fixed)[0]["draw"] == search["draw"]


def test_masks_that_do_not_become_stable_are_drawn_at_the_end_with_a_warning(commands, tmp_path):
    run = found(commands, tmp_path, *SEARCH, "--draw-when", "stable", "--draw-every", "1", "--record-epochs", "0.8")
    search = results(run)[0]
    assert (search["draw"]["fired"], search["draw"]["step"], search["steps"]) == (None, 5, 5)
    assert any("not stable by step 5, at which the ticket was drawn" in warning for warning in search["warnings"])
    assert units_of(run) == drawn(record_of(run)[-1])


def test_pre_training_from_random_weights_ends_as_a_checkpoint_whose_ticket_is_fine_tuned(commands, tmp_path):
    run = found(commands, tmp_path, "--draw-at", "4", "--init", "random", "--keep-models", script=MLM)
    search, training = results(run)
    pretrained = results(found(commands, tmp_path, "--draw-at", "4", script=MLM))[1]
    assert search["init_sha256"] == training["init_sha256"] != pretrained["init_sha256"]
    assert int(units_of(run)["neurons"].sum()) == 128 - round(0.3 * 128)
    given = ["--mask", run / "level_01" / "mask.safetensors", "--execution", "slim", "--model", run / "level_01" / "model"]
    (line,) = results(train(GLUE, [*commands[GLUE], *given, "--output-dir", tmp_path / "glue"]))
    assert (line["removed"], line["warnings"]) == (training["removed"], [w for w in line["warnings"] if "same weights" not in w])


# ---- killed and resumed ----

VARIANTS = [
    (GLUE, "--draw-at 4"),
    (GLUE, "--draw-at 4 --protocol released --grad-accum 2 --eval-steps 3"),
    (GLUE, "--draw-at 4 --keep-gates --execution masked"),
    (GLUE, "--draw-when stable --draw-every 1 --search-lr 1e-5 --batch-size 4"),
    ("lt_squad.py", "--draw-at 3 --protocol released"),
    (MLM, "--draw-at 4 --whole-search --record-epochs 0.1"),
]


@pytest.mark.parametrize(("script", "words"), VARIANTS)
def test_a_run_killed_in_any_stage_ends_with_the_same_bits(commands, tmp_path, monkeypatch, script, words):
    """Rows of the record after the checkpoint are written again."""
    monkeypatch.setattr(coefficients, "FLUSH", 1)
    runs = Runs(script, [*commands[script], "--method", "early-bird", "--save-steps", "2", *words.split()], tmp_path, monkeypatch)
    whole = runs("whole")
    assert "level_00/coefficients.npy" in whole
    steps = len(np.load(runs.dir("whole") / "level_00" / "coefficients.npy"))
    for step in (2, 4, steps + 1, steps + 4) if words == "--draw-at 4" else (3, steps + 3):
        left = runs.killed_at(step, f"killed{step}")
        assert (left / "coefficients.part").exists() == (step <= steps)
        assert runs(f"killed{step}") == whole


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("words", ["--draw-at 4", "--draw-when stable --draw-every 1 --search-lr 1e-5 --batch-size 4"])
def test_a_run_killed_after_the_draw_or_when_its_mask_is_written(commands, tmp_path, monkeypatch, before, words):
    """A search that ended early is not continued."""
    monkeypatch.setattr("bert_tickets.runs.checkpoint.EVALUATION", 0.0)  # a checkpoint after the last step
    runs = Runs(GLUE, [*commands[GLUE], "--method", "early-bird", *words.split()], tmp_path, monkeypatch)
    whole = runs("whole")
    for name, target, key in (("draw", session, "evaluate"), ("write", Mask, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(target, key, dying(getattr(target, key), 1, before=before))
            with pytest.raises(Killed):
                runs(name)
        assert (runs.dir(name) / "coefficients.part").exists()
        assert runs(name) == whole


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_a_damaged_record_starts_the_search_again(commands, tmp_path, monkeypatch, capsys, damage):
    runs = Runs(GLUE, [*commands[GLUE], "--method", "early-bird", "--draw-at", "4", "--save-steps", "2"], tmp_path, monkeypatch)
    whole, path = runs("whole"), runs.killed_at(4, "killed") / "coefficients.part"
    content = path.read_bytes()
    assert len(content) == 2 * 136 * 4
    path.unlink()
    if damage != "removed":
        path.write_bytes(content[:-1] if damage == "truncated" else content[:9] + b"x" + content[10:])
    assert any("coefficients.part" in problem for problem in problems(path.parent))
    assert runs("killed") == whole
    assert (
        "coefficients.part is not the one that checkpoint.safetensors continues; level 0 starts again" in capsys.readouterr().out
    )


def test_a_signal_stops_the_search_and_a_damaged_finished_record_is_a_problem(commands, run, tmp_path, monkeypatch):
    step = coefficients.Record.__call__
    with monkeypatch.context() as patch:
        patch.setattr(coefficients.Record, "__call__", dying(step, 3, by=lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Stopped, match="stopped in level 0 after step 3"):
            found(commands, tmp_path, *SEARCH, "--draw-at", "4", "--keep-models")
    again = found(commands, tmp_path, *SEARCH, "--draw-at", "4", "--keep-models")
    assert {name: data for name, data in contents(again).items() if name != "run.json"} == {
        name: data for name, data in contents(run).items() if name != "run.json"
    }
    path = shutil.copytree(run, tmp_path / run.name, dirs_exist_ok=True) / "level_00" / "coefficients.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert [problem for problem in problems(path.parent.parent) if "coefficients.npy is damaged" in problem]


def test_trained_weights_of_the_ticket_are_zero_where_it_prunes(run):
    weights, mask = read_tensors(run / "level_01" / "weights.safetensors"), Mask.load(run / "level_01" / "mask.safetensors")
    assert not any(weights[name][~kept].any() for name, kept in mask.items())
