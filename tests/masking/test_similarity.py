"""Mask overlap against masks counted by hand, against chance, by layer and kind; scripts/compare.py."""

from __future__ import annotations

from pathlib import Path

import compare
import pandas as pd
import pytest
import torch

from bert_tickets.cli import run_command
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.similarity import MEASURES, layer_and_kind, overlap, tensor_counts

LAYER = "bert.encoder.layer.{}."
SHAPES = {
    **{
        LAYER.format(layer) + name: shape
        for layer in range(11)  # so that layers sort as numbers
        for name, shape in {
            "attention.self.query.weight": (8, 8),
            "attention.self.query.bias": (8,),
            "output.dense.weight": (8, 16),
        }.items()
    },
    "bert.pooler.dense.weight": (8, 8),
}


def drawn(seed: int, density: float = 0.5) -> Mask:
    """A random mask over some of a BERT's matrices and biases."""
    generator = torch.Generator().manual_seed(seed)
    return Mask({name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()})


def bits(*tensors: str) -> Mask:
    return Mask({f"t{i}": torch.tensor([bit == "1" for bit in text]) for i, text in enumerate(tensors)})


def measured(one: Mask, other: Mask, over: str = "") -> dict[str, float]:
    """The measures of two masks, over the tensors with this in their names."""
    return overlap(tensor_counts(*(Mask({name: kept for name, kept in mask.items() if over in name}) for mask in (one, other))))


# ---- the measures ----


def test_a_pair_counted_by_hand():
    assert measured(bits("1110", "11100000"), bits("1011", "10000000")) == {
        "jaccard": 3 / 7,  # both keep 2 and 1, together 6 + 4 - 3
        "chance": 2 / 8,  # 6 * 4 / 12 = 2 shared are expected
        "chance_by_tensor": (9 / 4 + 3 / 8) / (10 - 9 / 4 - 3 / 8),  # 3 * 3 / 4 + 3 * 1 / 8
        "mean_jaccard": (2 / 4 + 1 / 3) / 2,
        "hamming": 4 / 12,
    }


def test_empty_masks_are_equal():
    assert measured(bits("000"), bits("000")) == dict.fromkeys(MEASURES, 1.0) | {"hamming": 0.0}


def test_masks_of_different_shapes_are_an_error():
    with pytest.raises(UserError, match="t0 is 3 in the other mask and 4 in the mask"):
        measured(bits("1100"), bits("110"))


# ---- layers and kinds ----


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.11.attention.output.dense.weight", ("11", "attention.output")),
        ("bert.embeddings.word_embeddings.weight", ("embeddings.word_embeddings",) * 2),
        ("w", ("w", "w")),
    ],
)
def test_layer_and_kind_follow_from_the_name(name, place):
    assert layer_and_kind(name) == place


# ---- scripts/compare.py ----


@pytest.fixture
def run(tmp_path):
    """Make the masks of a run's levels; returns the run directory."""

    def make(name: str, *densities: float, **info: object) -> Path:
        for level, density in enumerate(densities):
            path = tmp_path / name / f"level_{level:02d}" / "mask.safetensors"
            drawn(sum(map(ord, name)) + level, density).write(path, level=level, **info)
        return tmp_path / name

    return make


def call(*words: object) -> None:
    compare.main(compare.parse([str(word) for word in words]))


def cells(out: str) -> list[list[str]]:
    """The lines of the printed tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]


def test_three_masks_make_three_pairs_in_table_file_and_picture(run, tmp_path, capsys):
    theirs = drawn(0, 0.25)  # in the format of the released code, in another order
    torch.save({name + "_mask": kept.float() for name, kept in reversed([*theirs.items()])}, tmp_path / "random.pt")
    runs = [run(task, 1, 0.7, 0.5, task=task, seed=57) for task in ("mnli", "qqp")]
    call(*runs, tmp_path / "random.pt", "--level", 1, "--csv", tmp_path / "o.csv", "--output", tmp_path / "o.png")
    out, found = cells(capsys.readouterr().out), pd.read_csv(tmp_path / "o.csv")
    files = {"mnli": runs[0] / "level_01/mask.safetensors", "qqp": runs[1] / "level_01/mask.safetensors"}
    masks = {name: Mask.load(file) for name, file in (files | {"random": tmp_path / "random.pt"}).items()}
    for name, mask in masks.items():
        assert [name, f"{mask.sparsity:.1%}"] in [line[:2] for line in out]
    assert found[["mask", "and mask"]].values.tolist() == [["mnli", "qqp"], ["mnli", "random"], ["qqp", "random"]]
    for pair in found.to_dict("records"):
        one, other = masks[pair["mask"]], masks[pair["and mask"]]
        assert pair["jaccard"] == one.overlap(other)
        assert pair["chance"] == pytest.approx(1 / (1 / one.density + 1 / other.density - 1))
        assert [pair["mask"], pair["and mask"], *(f"{pair[name]:.4f}" for name in MEASURES)] in out
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_masks_of_one_task_are_named_by_what_differs(run, capsys):
    runs = [run(f"a{seed}", 1, 0.5, task="mnli", method="imp", seed=seed) for seed in (57, 58)]
    call(*runs, runs[0] / "level_00")
    names = ["mnli seed 57 level 1", "mnli seed 58 level 1", "mnli seed 57 level 0"]
    assert [line[0] for line in cells(capsys.readouterr().out)[1:4]] == names
    call(runs[0], runs[0], "--output", runs[0] / "o.png")
    assert [line[0][:2] for line in cells(capsys.readouterr().out)[1:3]] == ["1 ", "2 "]


def test_two_masks_by_part(run, tmp_path, capsys):
    places = [run(task, 0.5, task=task) for task in ("mnli", "qqp")]
    call(*places, "--by", "kind", "--csv", tmp_path / "o.csv", "--output", tmp_path / "o.svg")
    out, shown = cells(capsys.readouterr().out), (tmp_path / "o.svg").read_text()
    one, other = (Mask.load(place / "level_00/mask.safetensors") for place in places)
    kinds = {line[1]: line for line in out[-5:]}
    assert list(kinds) == ["attention.query", "attention.query.bias", "output", "pooler", "all"]
    expected = measured(one, other, "query.weight")
    assert kinds["attention.query"][:3] == ["all", "attention.query", str(11 * 64)]
    assert kinds["attention.query"][5:] == [f"{expected[name]:.4f}" for name in MEASURES]
    assert float(kinds["all"][3]) == pytest.approx(100 * one.density, abs=1e-4)
    written = pd.read_csv(tmp_path / "o.csv", index_col=["layer", "kind"])
    assert list(dict.fromkeys(written.index.get_level_values("layer"))) == [*map(str, range(11)), "pooler", "all"]
    assert written.loc[("7", "all"), "jaccard"] == measured(one, other, ".7.")["jaccard"]
    assert written.loc[("3", "output"), "jaccard"] == measured(one, other, "3.output")["jaccard"]
    cell = measured(one, other, "3.attention.self.query.weight")
    for text in ("attention.query", "10", f"{cell['jaccard']:.3f}", f"({cell['chance']:.3f})"):
        assert f">{text}<" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a/level_00", "give at least two masks"),
        ("a b a --by kind", "--by kind compares two masks, and 3 were given"),
        ("a/level_00 other.safetensors --level 0", "--level 0 has no effect"),
        ("a b --level 7", "a has no finished level 7; its levels are 0 to 1"),
        ("a .", ". has no finished level"),
        (
            "a other.safetensors",
            "a/level_01/mask.safetensors and other.safetensors cannot be compared: the mask covers bert.pooler.dense.weight",
        ),
        ("a text", "text is damaged"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        run(name, 1, 0.5)
    one = drawn(1)
    Mask({name: kept for name, kept in one.items() if "pooler" not in name}).write("other.safetensors")
    Path("text").write_text("no mask")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: call(*words.split()))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
