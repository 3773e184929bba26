"""The picture of what searches keep: shares of seeds and of entries, a panel per task."""

import figures
import numpy as np
import pytest
import rundirs
import torch

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import HEAD_OUTPUT, INNER, LAYER, OUTER, QKV
from bert_tickets.report.survival import unit_shares


@pytest.fixture
def plot(tmp_path, capsys):
    """Run `scripts/figures.py survival` in this process; the lines of the table that it prints, and the picture's text."""

    def run(*words: object) -> tuple[list[list[str]], str]:
        figures.main(figures.parse(["survival", *map(str, words), "--output", str(tmp_path / "f.svg")]))
        out = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]
        return lines, (tmp_path / "f.svg").read_text()

    return run


def test_shares_of_seeds_by_task(plot, tmp_path):
    masks = {"mnli": [("1111 1100", "11"), ("1101 1110", "10")], "rte": [("0000 1000", "01")]}
    for task, found in masks.items():
        for seed, units in enumerate(found):
            rundirs.search(tmp_path, task, seed, rundirs.units(*units), [0.8, 0.7])
    lines, picture = plot(tmp_path)
    assert lines == [
        ["task", "layer", "head 0", "head 1", "head 2", "head 3", "MLP"],
        ["MNLI", "0", "1.00", "1.00", "0.50", "1.00", "1.00"],
        ["MNLI", "1", "1.00", "1.00", "0.50", "0.00", "0.50"],
        ["RTE", "0", "0.00", "0.00", "0.00", "0.00", "0.00"],
        ["RTE", "1", "1.00", "0.00", "0.00", "0.00", "1.00"],
    ]
    for words in (
        "MNLI (2 seeds)",
        "RTE (1 seed)",
        "share of seeds that keep it",
        ".5",
        "Heads and MLPs of the importance ticket",
    ):
        assert f">{words}<" in picture
    assert picture.count(">MLP<") == 2


def test_heads_and_mlps_alone_have_pictures_of_their_own(plot, tmp_path):
    rundirs.search(tmp_path, "mnli", 1, rundirs.units("1111 1100"), [0.8, 0.7], units="heads")
    rundirs.search(tmp_path, "mnli", 1, rundirs.units(mlps="10"), [0.8, 0.7], units="mlps")
    lines, picture = plot(tmp_path, "--method", "importance (units heads)")
    assert lines[1] == ["MNLI", "0", "1.00", "1.00", "1.00", "1.00", ""]
    assert ">MLP<" not in picture
    lines, picture = plot(tmp_path, "--method", "importance (units mlps)")
    assert [line[-1] for line in lines[1:]] == ["1.00", "0.00"]
    assert ">head<" not in picture
    with pytest.raises(UserError, match=r"there are importance \(units heads\), importance \(units mlps\)$"):
        plot(tmp_path)


def test_of_masks_of_weights_shares_of_the_entries(plot, tmp_path):
    """Of head 1 of layer 0 the rows of query and half of the columns of the output go: 2 * 9 + 8 of 70; of its MLP one of 110."""
    kept = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in rundirs.LIKE.items()}
    for part in ("weight", "bias"):
        kept[f"{LAYER}0.{QKV[0]}.{part}"][2:4] = False
    kept[f"{LAYER}0.{HEAD_OUTPUT}.weight"][:4, 2:4] = False
    kept[f"{LAYER}0.{INNER}.weight"][5, 7] = False
    del kept[f"{LAYER}1.{OUTER}.weight"], kept[f"{LAYER}1.{OUTER}.bias"]
    heads, mlps = unit_shares(Mask(kept), rundirs.HEADS)
    assert np.allclose(heads, [[1, 1 - 26 / 70, 1, 1], [1, 1, 1, 1]])
    assert np.allclose(mlps, [1 - 1 / 110, 1])
    rundirs.search(tmp_path, "mnli", 1, Mask(kept), [0.8, 0.7], method="guarded_magnitude")
    lines, picture = plot(tmp_path, "--method", "guarded-magnitude")
    assert lines[1] == ["MNLI", "0", "1.00", "0.63", "1.00", "1.00", "0.99"]
    assert ">share of its entries that is kept, mean over seeds<" in picture
