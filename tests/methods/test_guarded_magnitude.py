"""Guarded magnitude pruning of fine-tuned weights (Prasanna et al. 2020, m-pruning)."""

import pytest
import torch
from trainrun import Killed, dying, of_sst2, same, train

from bert_tickets.files import read_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.methods import guarded_magnitude
from bert_tickets.runs.directory import results
from bert_tickets.runs.integrity import problems


def found(commands, folder, *more):
    words = of_sst2(commands, "--method", "guarded-magnitude", "--threshold", "1", "--output-dir", folder, *more)
    return train("lt_glue.py", words)


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    return found(commands, tmp_path_factory.mktemp("runs"))


def test_what_is_left_is_a_power_of_nine_tenths_of_the_fine_tuned_weights(run):
    good = results(run)[1]
    mask, trained = Mask.load(run / "level_01" / "mask.safetensors"), read_tensors(run / "level_00" / "weights.safetensors")
    accepted = [p for p in good["passes"] if p["accepted"]]
    assert 1 < len(accepted) < len(good["passes"]) <= 10
    expected = Mask.ones({name: trained[name] for name in mask})
    for j, line in enumerate(accepted):
        assert line["kept"] == pytest.approx(0.9**j, abs=10 / mask.total)
        expected = prune(expected, magnitude(trained), 0.1) if j else expected
    assert mask == expected
    left = read_tensors(run / "level_01" / "weights.safetensors")
    assert all(torch.equal(left[name], trained[name] * mask[name] if name in mask else trained[name]) for name in left)
    assert good["metrics"]["accuracy"] == pytest.approx(accepted[-1]["score"])
    covered = {name.split(".", 4)[-1] for name in mask}
    assert "output.dense.bias" not in covered
    assert {"attention.output.dense.bias", "intermediate.dense.bias"} < covered
    assert len(mask) == 2 * 11
    assert problems(run) == []


def test_removals_end_the_search(commands, run, tmp_path):
    weights = run / "level_00" / "weights.safetensors"
    good = results(found(commands, tmp_path, "--weights", weights, "--threshold", "0", "--removals", "3"))[1]
    assert [p["accepted"] for p in good["passes"]] == [True] * 4
    assert good["sparsity"] == pytest.approx(1 - 0.9**3, abs=1e-3)


def test_a_killed_search_ends_bit_identical(commands, run, tmp_path, monkeypatch):
    for number in (1, 2, 2, 1):
        with monkeypatch.context() as patch:
            patch.setattr(guarded_magnitude, "measure", dying(guarded_magnitude.measure, number))
            with pytest.raises(Killed):
                found(commands, tmp_path)
    assert same(found(commands, tmp_path), run)
