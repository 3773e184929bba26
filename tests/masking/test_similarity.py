"""Masks side by side: the numbers against masks counted by hand, against chance, by layer and kind; and the pictures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_mask import BERT_BASE, bits, saved

import bert_tickets.masking.similarity
from bert_tickets.cli import run_command
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.similarity import common, find, grid, label, likeness, main, measure, pack, parse, parts, place_of
from bert_tickets.report.heatmap import draw, ink_on, tenths

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYER, POOLER = "bert.encoder.layer.{}.", "bert.pooler.dense.weight"
SHAPES = {
    **{
        LAYER.format(layer) + name: shape
        for layer in range(11)  # so that layers sort as numbers
        for name, shape in {
            "attention.self.query.weight": (8, 8),
            "attention.self.query.bias": (8,),
            "attention.output.dense.weight": (8, 8),
            "output.dense.weight": (8, 16),
        }.items()
    },
    POOLER: (8, 8),
    "gate": (3,),
}


def drawn(seed: int, density: float = 0.5) -> Mask:
    """A random mask over some of a BERT's matrices, a layer's biases and a name of no BERT."""
    generator = torch.Generator().manual_seed(seed)
    return Mask({name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()})


def compared(*masks: Mask, over: list[str] | None = None) -> dict:
    sizes = {name: tensor.numel() for name, tensor in masks[0].items() if over is None or name in over}
    one, other = map(pack, masks)
    return likeness(sizes, common(one, one), common(other, other), common(one, other))


@pytest.fixture
def run_dir(tmp_path):
    """Make a run directory of some levels, and return its path as it would be typed."""

    def make(name: str, levels: list[int], **info: str) -> str:
        for level in levels:
            mask = drawn(sum(map(ord, name)) + level, 1 - level / 10)
            mask.write(tmp_path / name / f"level_{level:02d}" / "mask.safetensors", level=str(level), **info)
        return str(tmp_path / name)

    return make


def compare(*words: object) -> None:
    main(parse([str(word) for word in words]))


# ---- counting ----


def test_a_pair_by_hand():
    one, other = bits("1100", "11110000"), bits("1010", "11000000")
    assert compared(one, other) == {
        "weights": 12,
        "kept": [6, 4],
        "overlap": 3 / 7,  # both keep 1 and 2, together 6 + 4 - 3
        "chance": 2 / 8,  # 6 * 4 / 12 = 2 in common are expected
        "chance_in_tensors": 2 / 8,  # 2 * 2 / 4 + 4 * 2 / 8
        "distance": 4 / 12,
    }


def test_chance_in_tensors_knows_that_both_keep_the_same_tensor():
    likeness = compared(bits("1111", "0000"), bits("1111", "0000"))
    assert (likeness["overlap"], likeness["chance"], likeness["chance_in_tensors"]) == (1, 1 / 3, 1)


@pytest.mark.parametrize(("one", "other", "overlap"), [("000", "000", 1), ("000", "111", 0), ("111", "111", 1)])
def test_empty_and_full_masks(one, other, overlap):
    likeness = compared(bits(one), bits(other))
    assert likeness["overlap"] == likeness["chance"] == likeness["chance_in_tensors"] == overlap


@pytest.mark.parametrize("seed", range(5))
def test_overlap_and_distance_are_the_masks_own(seed):
    one, other = drawn(seed, 0.2 * seed), drawn(seed + 100)
    likeness = compared(one, other)
    assert likeness["overlap"] == one.overlap(other)
    assert likeness["distance"] == pytest.approx(one.distance(other), abs=1e-15)
    assert likeness["kept"] == [one.kept, other.kept]


def test_chance_is_what_random_masks_have():
    """Means over 200 drawn pairs: places drawn over all weights, or within each tensor."""
    one = Mask({"a": torch.arange(2000) < 1500, "b": torch.arange(3000) < 300})
    other = Mask({"a": torch.arange(2000) < 800, "b": torch.arange(3000) < 100})
    expected, generator = compared(one, other), torch.Generator().manual_seed(0)
    flat = [Mask({"all": torch.cat([mask["a"], mask["b"]])}) for mask in (one, other)]
    for pair, key in ((flat, "chance"), ([one, other], "chance_in_tensors")):
        overlaps = torch.tensor([pair[0].shuffle(generator).overlap(pair[1].shuffle(generator)) for _ in range(200)]).double()
        assert abs(overlaps.mean() - expected[key]) < 4 * overlaps.std() / 200**0.5 + 1e-4
    assert expected["chance_in_tensors"] > expected["chance"] + 0.1


# ---- layers and kinds ----


def test_every_matrix_of_bert_base_has_its_layer_and_kind():
    places = [place_of(name) for name in BERT_BASE]
    kinds = ["query", "key", "value", "attention output", "intermediate", "output"]
    assert places == [(str(layer), kind) for layer in range(12) for kind in kinds] + [("pooler", "pooler")]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query.bias", ("3", "other")),
        ("bert.encoder.layer.3.output.LayerNorm.weight", ("3", "other")),
        ("bert.pooler.dense.bias", ("pooler", "other")),
        ("bert.embeddings.word_embeddings.weight", ("other", "other")),
        ("classifier.weight", ("other", "other")),
        ("w", ("other", "other")),
    ],
)
def test_what_is_no_matrix_of_a_layer_is_other(name, place):
    assert place_of(name) == place


def test_parts_come_in_the_networks_order_whatever_the_masks_is():
    sizes = {name: math.prod(shape) for name, shape in reversed(SHAPES.items())}
    assert list(parts(sizes, "layer")) == [*map(str, range(11)), "pooler", "other", "all"]
    assert list(parts(sizes, "kind")) == ["query", "attention output", "output", "pooler", "other", "all"]
    for by in ("layer", "kind"):
        *split, whole = (sum(part.values()) for part in parts(sizes, by).values())
        assert sum(split) == whole == sum(sizes.values())


def test_a_part_is_compared_as_a_mask_of_its_tensors_would_be():
    one, other = drawn(1), drawn(2, 0.3)
    sizes = {name: tensor.numel() for name, tensor in one.items()}
    a, b = pack(one), pack(other)
    found = grid(sizes, common(a, a), common(b, b), common(a, b))
    query, output, bias = (
        LAYER.format(7) + name for name in ("attention.self.query.weight", "output.dense.weight", "attention.self.query.bias")
    )
    assert found["7"]["query"] == compared(one, other, over=[query])
    assert found["7"]["output"] == compared(one, other, over=[output])
    assert found["7"]["other"] == compared(one, other, over=[bias])
    assert found["7"]["all"] == compared(one, other, over=[name for name in SHAPES if ".7." in name])
    assert found["all"]["query"] == compared(one, other, over=[name for name in SHAPES if name.endswith("query.weight")])
    assert found["all"]["all"] == compared(one, other)
    assert found["pooler"].keys() == {"pooler", "all"}


# ---- which masks ----


def test_a_run_directory_is_its_newest_level_or_the_one_asked_for(run_dir):
    run = run_dir("rte", [0, 2, 9, 10])
    (Path(run) / ".level_11.tmp").mkdir()
    assert find(run, None) == Path(run) / "level_10" / "mask.safetensors"
    assert find(run, 2) == Path(run) / "level_02" / "mask.safetensors"
    assert find(run + "/level_09", 2) == Path(run) / "level_09" / "mask.safetensors"  # a level's folder is that level
    assert find(run + "/level_09/mask.safetensors", 2) == Path(run) / "level_09" / "mask.safetensors"


LEVEL = "runs/{}/level_0{}/mask.safetensors"


@pytest.mark.parametrize(
    ("masks", "labels"),
    [
        ([("a.safetensors", {}), ("b/mask.pt", {})], ["a", "b"]),
        ([("mask.pt", {}), ("a/mask.pt", {})], ["mask.pt", "a"]),
        ([("x/a.pt", {}), ("y/a.pt", {})], ["x/a", "y/a"]),
        ([("a/one.pt", {}), ("x/a/one.pt", {})], ["a/one", "x/a/one"]),
        ([("a.pt", {}), ("a.safetensors", {})], ["a.pt", "a.safetensors"]),
        ([(LEVEL.format("m", 6), {}), (LEVEL.format("m", 7), {})], ["level_06", "level_07"]),
        ([("oneshot_0.5", {}), ("oneshot_0.6", {})], ["oneshot_0.5", "oneshot_0.6"]),
        ([(LEVEL.format("m", 7), "mnli 7 57"), (LEVEL.format("q", 6), "qqp 6 58")], ["mnli", "qqp"]),
        ([(LEVEL.format("m", 7), "mnli 7 57"), (LEVEL.format("m", 6), "mnli 6 57")], ["mnli level 7", "mnli level 6"]),
        ([(LEVEL.format("m", 7), "mnli 7 57"), (LEVEL.format("n", 7), "mnli 7 58")], ["mnli seed 57", "mnli seed 58"]),
        ([(LEVEL.format("m", 7), "mnli 7 57"), (LEVEL.format("n", 7), "mnli 7 57")], ["m", "n"]),
        ([(LEVEL.format("m", 7), "mnli 7 57")] * 2, ["m #1", "m #2"]),
        ([(LEVEL.format("rte-ticket", 0), {}), (LEVEL.format("m", 7), "mnli 7 57")], ["rte-ticket", "mnli"]),
        (
            [(LEVEL.format("m", 7), "mnli 7 57"), (LEVEL.format("m", 6), "mnli 6 57"), (LEVEL.format("n", 7), "mnli 7 58")],
            ["mnli level 7 seed 57", "mnli level 6", "mnli level 7 seed 58"],
        ),
    ],
)
def test_labels_are_short_and_no_two_alike(masks, labels):
    infos = [dict(zip(("task", "level", "seed"), info.split(), strict=True)) if info else {} for _, info in masks]
    assert label([Path(path) for path, _ in masks], infos) == labels


def test_the_released_codes_masks_compare_with_ours(tmp_path):
    ours, theirs = drawn(1), drawn(2)
    ours.write(tmp_path / "ours.safetensors")
    backwards = reversed(theirs.items())  # the order of the tensors is the file's own affair
    (tmp_path / "mask.pt").write_bytes(saved({name + "_mask": tensor.float() for name, tensor in backwards}))
    found = measure([tmp_path / "ours.safetensors", tmp_path / "mask.pt"], by_part=False)
    assert found["pairs"][0]["overlap"] == ours.overlap(theirs)


# ---- the command ----


def test_three_masks_make_three_pairs_a_table_a_file_and_a_picture(run_dir, tmp_path, capsys):
    runs = [run_dir(task, [0, 3, 5], task=task, seed="57") for task in ("mnli", "qqp")]
    drawn(0, 0.25).write(tmp_path / "random.safetensors")
    compare(*runs, tmp_path / "random.safetensors", "--json", tmp_path / "o.json", "--output", tmp_path / "o.png", "--level", 3)
    found = json.loads((tmp_path / "o.json").read_text())
    assert [mask["label"] for mask in found["masks"]] == ["mnli", "qqp", "random"]
    assert [mask["about"].get("level") for mask in found["masks"]] == ["3", "3", None]
    assert [pair["masks"] for pair in found["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    masks = [Mask.load(mask["file"]) for mask in found["masks"]]
    out = capsys.readouterr().out
    for mask, told in zip(masks, found["masks"], strict=True):
        assert told["sparsity"] == pytest.approx(mask.sparsity)
        assert f"{mask.sparsity:.1%}" in out
    for pair in found["pairs"]:
        one, other = (masks[i] for i in pair["masks"])
        assert pair["overlap"] == one.overlap(other)
        assert pair["chance"] == pytest.approx(1 / (1 / one.density + 1 / other.density - 1))
        line = next(
            line.split() for line in out.splitlines() if line.split()[:2] == [found["masks"][i]["label"] for i in pair["masks"]]
        )
        assert line[2:] == [f"{pair[key]:.4f}" for key in ("overlap", "chance", "chance_in_tensors", "distance")]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by", ["layer", "kind"])
def test_two_masks_part_by_part(run_dir, tmp_path, capsys, by):
    places = [run_dir(task, [5], task=task) for task in ("mnli", "qqp")]
    compare(*places, "--by", by, "--json", tmp_path / "o.json", "--output", tmp_path / "o.png")
    cells = json.loads((tmp_path / "o.json").read_text())["parts"]
    rows = cells["all"] if by == "kind" else {layer: row["all"] for layer, row in cells.items()}
    assert {"other", "pooler", "all"} < set(rows)
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.split()[:2] == [by, "weights"])
    assert "kept by mnli  kept by qqp" in header
    for part, like in rows.items():
        densities = [f"{kept / like['weights']:.1%}" for kept in like["kept"]]
        numbers = [f"{like[key]:.4f}" for key in ("overlap", "chance", "chance_in_tensors", "distance")]
        assert [*part.split(), f"{like['weights']:,}", *densities, *numbers] in [line.split() for line in out.splitlines()]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_of_other_formats(run_dir, tmp_path, suffix, start):
    run = run_dir("mnli", [1, 2], task="mnli")
    compare(run + "/level_01", run, "--output", tmp_path / f"o{suffix}")
    assert (tmp_path / f"o{suffix}").read_bytes().startswith(start)


def test_a_picture_says_what_it_shows(run_dir, tmp_path):
    """Labels, values and chance as text of the picture."""
    places = [run_dir(task, [5], task=task) for task in ("mnli", "qqp")]
    compare(*places, "--output", tmp_path / "o.svg")
    (pair,) = measure([find(place, None) for place in places], by_part=False)["pairs"]
    shown = (tmp_path / "o.svg").read_text()
    for text in ("mnli", "qqp", "mask", "overlap of the kept weights", f"{pair['overlap']:.3f}", f"({pair['chance']:.3f})"):
        assert f">{text}<" in shown, text


@pytest.mark.parametrize(
    ("values", "ends"),
    [([0.95, 0.98], (0.9, 1)), ([0.18, 0.61], (0.1, 0.7)), ([0.5], (0.5, 0.6)), ([1.0, 1.0], (0.9, 1)), ([0.0], (0, 0.1))],
)
def test_the_scale_is_as_wide_as_the_values_and_ends_on_tenths(values, ends):
    assert tenths(values) == ends


def test_the_ink_stands_out_from_every_colour_of_the_scale():
    from matplotlib import colormaps

    def luminance(color):
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for step in range(101):
        color = colormaps["cividis"](step / 100)
        dark, light = sorted((luminance(color), {"black": 0.0, "white": 1.0}[ink_on(color)]))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_ink_is_chosen_for_the_colour_on_this_pictures_scale(tmp_path, monkeypatch):
    inks: list[str] = []
    monkeypatch.setattr(bert_tickets.report.heatmap, "ink_on", lambda color: inks.append(ink_on(color)) or inks[-1])
    draw(tmp_path / "o.png", "title", ("x", "y"), ["a", "b"], ["c"], [[(0.91, ""), (0.99, "")]], "values")
    assert inks == ["white", "black"]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a/level_05"], "two masks are needed"),
        (["a", "b", "a", "--by", "kind"], "--by kind compares two masks, and 3 were given"),
        (["a", "b", "--by", "head"], "invalid choice: 'head'"),
        (["a/level_05", "other.safetensors", "--level", "5"], "--level 5 chooses within run directories"),
        (["a", "b", "--output", "o.jpg"], "a picture is .png, .svg or .pdf"),
        (["a", "b", "--level", "7"], "a has no level 7; it has 0, 5"),
        (["a", "."], ". holds no mask"),
        (["a", "nowhere"], "no mask file at nowhere"),
        (["a/level_05", "nowhere", "--level", "5"], "no mask file at nowhere"),
        (
            ["a", "other.safetensors"],
            "a/level_05/mask.safetensors is no mask of the same network: gate is 4 in other.safetensors and 3",
        ),
        (["other.safetensors", "fewer.safetensors"], "the mask covers gate, which fewer.safetensors does not have"),
        (["a", "LICENSE"], "damaged, or no mask file"),
        (["a", "b", "--json", "/proc/nowhere/o.json"], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_sentence_and_exit_code_2(run_dir, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        run_dir(name, [0, 5])
    one = drawn(1)
    Mask({**one, "gate": torch.ones(4) == 1}).write("other.safetensors")
    Mask({name: tensor for name, tensor in one.items() if name != "gate"}).write("fewer.safetensors")
    (tmp_path / "LICENSE").write_text((ROOT / "LICENSE").read_text())
    with pytest.raises(SystemExit) as end:
        run_command(lambda: compare(*words))
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


def test_without_matplotlib_a_picture_is_refused_and_the_extra_is_named(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = run_dir("a", [0, 5])
    with pytest.raises(SystemExit) as end:
        run_command(lambda: compare(run, run, "--output", "o.png"))
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "[figures]" in captured.err
    assert captured.out == ""  # before anything was counted
    compare(run, run)  # only drawing needs it


def test_help_answers_at_once_and_imports_nothing_heavy():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bert_tickets.masking.similarity", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0
    assert "usage: python -m bert_tickets.masking.similarity" in ran.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "numpy", "matplotlib", "safetensors"})


def test_the_examples_are_accepted():
    """Of the help and the README."""
    lines = [line.strip() for text in (bert_tickets.masking.similarity.__doc__, README) for line in text.splitlines()]
    examples = [
        line.partition("#")[0].split()[3:] for line in lines if line.startswith("python -m bert_tickets.masking.similarity ")
    ]
    assert len(examples) >= 2
    for words in examples:
        assert len(parse(words).masks) >= 2
