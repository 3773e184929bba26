"""Runs of the search of heads and MLPs, killed and resumed, and what is scored and trained afterwards (Prasanna et al. 2020)."""

import json
import os
import signal

import pytest
from trainrun import Killed, dying, of_sst2, same, train

from bert_tickets.cli import parse
from bert_tickets.errors import Damaged, Stopped, UserError
from bert_tickets.files import read_checksummed, write_checksummed
from bert_tickets.masking.mask import Mask
from bert_tickets.methods import importance
from bert_tickets.modeling.units import read_units
from bert_tickets.runs import journal
from bert_tickets.runs.directory import results
from bert_tickets.runs.integrity import problems


def found(commands, folder, *more):
    own = ["--method", "importance", "--threshold", "0.8", "--head-fraction", "0.25"]
    return train("lt_glue.py", of_sst2(commands, *own, "--output-dir", folder, *more))


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    return found(commands, tmp_path_factory.mktemp("runs"))


def test_a_run_has_the_fine_tuned_network_and_its_good_subnetwork(run):
    dense, good = results(run)
    mask = Mask.load(run / "level_01" / "mask.safetensors")
    units = read_units(mask)
    last = [p for p in good["passes"] if p["accepted"]][-1]
    assert (dense["steps"], dense["sparsity"], good["steps"]) == (30, 0, 0)
    assert {kind: int(kept.sum()) for kind, kept in units.items()} == {kind: last[kind] for kind in ("heads", "mlps")}
    assert 0 < units.kept < 10
    assert good["metrics"]["accuracy"] == pytest.approx(last["score"])  # the gated network scores what the masked one does
    assert good["passes"][0]["score"] == pytest.approx(dense["metrics"]["accuracy"])
    assert all(p["accepted"] == (p["score"] >= 0.8 * good["passes"][0]["score"]) for p in good["passes"])
    assert (good["sizes"]["heads_kept"], good["sizes"]["mlps_kept"]) == (last["heads"], last["mlps"])
    assert (run / "level_00" / "weights.safetensors").exists()  # what tickets are scored on
    assert mask.info["units"] == "heads+mlps"
    assert not (run / "search.json").exists()  # the level has its passes
    assert problems(run) == []


def test_a_kept_network_that_is_gone_is_a_problem(commands, tmp_path):
    run = found(commands, tmp_path, "--max-steps", "2")
    (run / "level_00" / "weights.safetensors").unlink()
    assert any("level_00/weights.safetensors" in problem for problem in problems(run))


def test_the_search_killed_in_every_pass_ends_bit_identical(commands, run, tmp_path, monkeypatch):
    """It dies after, then in its next measurement, and so on; also in the training, and before the search."""
    deaths = 0
    passes = len(results(run)[1]["passes"])
    for number in range(2 * passes):
        with monkeypatch.context() as patch:
            place = (journal, "write_checksummed") if number % 2 else (importance, "measure")
            patch.setattr(*place, dying(getattr(*place), 2 if number % 2 == 0 and number else 1, before=number % 2 == 0))
            try:
                again = found(commands, tmp_path)
                break
            except Killed:
                deaths += 1
    assert deaths >= passes
    assert same(again, run)


def test_a_stop_signal_ends_the_run_after_a_pass_and_nothing_is_measured_twice(commands, run, tmp_path, monkeypatch):
    calls = []
    measure = importance.measure

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(importance, "measure", counted)
    with pytest.raises(Stopped, match="stopped in level 1 after step 2, saved in"):
        found(commands, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(json.loads((folder / "search.json").read_text())["measurements"]) == 2
    again = found(commands, tmp_path)
    assert len(calls) == len(results(run)[1]["passes"])
    assert same(again, run)


@pytest.mark.parametrize("damage", ["text", "other run"])
def test_a_damaged_journal_starts_the_search_again(commands, run, tmp_path, monkeypatch, capsys, damage):
    with monkeypatch.context() as patch:
        patch.setattr(importance, "measure", dying(importance.measure, 3))
        with pytest.raises(Killed):
            found(commands, tmp_path)
    (folder,) = tmp_path.iterdir()
    path = folder / "search.json"
    if damage == "text":
        path.write_text(path.read_text().replace("0", "1", 1))
    else:
        write_checksummed(path, {"run": "another", "level": 1, "measurements": []})
    assert problems(folder) != []
    again = found(commands, tmp_path)
    assert "level 1 starts again" in capsys.readouterr().out
    assert same(again, run)


def test_measurements_of_another_search_are_refused(commands, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importance, "measure", dying(importance.measure, 3))
        with pytest.raises(Killed):
            found(commands, tmp_path)
    (folder,) = tmp_path.iterdir()
    content = read_checksummed(folder / "search.json")
    content["measurements"][1]["key"] = "another mask"
    write_checksummed(folder / "search.json", content)
    with pytest.raises(Damaged, match="belongs to another search: delete it, and the search starts again"):
        found(commands, tmp_path)


def test_trained_weights_are_taken_instead_of_training(commands, run, tmp_path):
    weights = run / "level_00" / "weights.safetensors"
    taken = found(commands, tmp_path, "--threshold", "0.8", "--weights", weights)
    (dense, good), (other, same) = results(run), results(taken)
    assert (other["steps"], other["metrics"]) == (0, dense["metrics"])
    assert (same["passes"], same["mask_sha256"]) == (good["passes"], good["mask_sha256"])
    assert (taken / "level_01" / "weights.safetensors").stat().st_size == (
        run / "level_01" / "weights.safetensors"
    ).stat().st_size


def test_the_good_ticket_is_scored_on_its_runs_weights_and_trained_from_theta_0(commands, run, tmp_path):
    mask, weights = run / "level_01" / "mask.safetensors", run / "level_00" / "weights.safetensors"
    scored = train("lt_glue.py", of_sst2(commands, "--score", "--mask", mask, "--weights", weights, "--output-dir", tmp_path))
    (line,) = results(scored)
    assert (line["metrics"], line["steps"], line["method"]) == (results(run)[1]["metrics"], 0, "score")
    trained = train("lt_glue.py", of_sst2(commands, "--mask", mask, "--output-dir", tmp_path))
    (line,) = results(trained)
    assert line["mask_sha256"] == results(run)[1]["mask_sha256"]
    assert not any("does not cover" in warning or "same weights" in warning for warning in line["warnings"])


def test_other_settings_change_what_they_say(commands, run, tmp_path):
    """The released code's importances, the search on training examples, layers that are not normalized, heads alone."""
    weights = ["--weights", run / "level_00" / "weights.safetensors"]

    def lines(*more):
        return results(found(commands, tmp_path, *weights, *more))[1]

    plain = lines()
    assert lines("--search-set", "train")["passes"][0]["score"] != plain["passes"][0]["score"]
    dropped = {name: lines(*more)["passes"][1]["dropped"] for name, more in {
        "batches": ("--accumulate", "batch", "--search-batch-size", "4"),
        "reference": ("--accumulate", "reference", "--search-batch-size", "4"),
        "layers": ("--normalize", "none"),
        "heads": ("--units", "heads"),
        "half": ("--head-fraction", "0.5"),
    }.items()}  # fmt: skip
    assert len(dropped["half"]["heads"]) == 4
    run = found(commands, tmp_path, *weights, "--empty-bias", "drop")
    biases = [name for name in Mask.load(run / "level_01" / "mask.safetensors") if name.endswith("attention.output.dense.bias")]
    assert len(biases) == 2
    assert "mlps" not in dropped["heads"]
    first = plain["passes"][1]["dropped"]
    assert any(dropped[name] != first for name in ("batches", "reference", "layers"))


def test_the_released_protocol_sets_its_flags():
    cfg = parse("glue", None, ["--task=rte", "--method=importance", "--protocol=released"])
    assert (cfg.settings.accumulate, cfg.settings.empty_bias) == ("reference", "drop")
    cfg = parse("glue", None, ["--task=rte", "--method=importance"])
    assert (cfg.settings.accumulate, cfg.settings.empty_bias, cfg.settings.threshold) == ("example", "keep", 0.9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method importance --search-batch-size 8", "has no effect with --accumulate example"),
        ("--method importance --units mlps --empty-bias drop", "--empty-bias has no effect with --units mlps"),
        ("--method importance --weights w --lr 1", "--lr has no effect with --weights"),
        ("--method importance --head-fraction 0", "must be above 0"),
        ("--method importance --threshold -1", "must be at least 0"),
        ("--method importance --threshold nan", "must be at least 0"),
        ("--method guarded-magnitude --weights w --init random", "--init has no effect with --weights"),
        ("--method guarded-magnitude --rate 1", "must be between 0 and 1"),
        ("--method guarded-magnitude --removals 0", "must be at least 1"),
        ("--score --mask m", "--score needs --weights"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("glue", None, ["--task", "rte", *words.split()])
    assert message in capsys.readouterr().err


def test_weights_that_are_missing_or_of_another_task_are_refused(commands, run, tmp_path):
    with pytest.raises(UserError, match="--weights nowhere: no such file"):
        found(commands, tmp_path, "--weights", "nowhere")
    weights = run / "level_00" / "weights.safetensors"
    with pytest.raises(UserError, match=r"belongs to another network: it has no classifier\.weight of shape"):
        found(commands, tmp_path, "--task", "mnli", "--weights", weights)
