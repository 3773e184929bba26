"""scripts/derive.py: files of derived tickets, what it prints, and mistakes."""

from __future__ import annotations

import derive
import pytest
import torch
from safetensors.torch import save_file

from bert_tickets.cli import run_command
from bert_tickets.content import fingerprint
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import lower, read_units

LAYER = "bert.encoder.layer.{}."
BIAS = "attention.output.dense.bias"
SHAPES = {f"attention.self.{name}.weight": (8, 8) for name in ("query", "key", "value")}
SHAPES |= {f"attention.self.{name}.bias": (8,) for name in ("query", "key", "value")}
SHAPES |= {"attention.output.dense.weight": (8, 8), BIAS: (8,)}
SHAPES |= {"intermediate.dense.weight": (16, 8), "intermediate.dense.bias": (16,)}
SHAPES |= {"output.dense.weight": (8, 16), "output.dense.bias": (8,)}
WEIGHTS = {LAYER.format(layer) + name: torch.zeros(shape) for layer in range(3) for name, shape in SHAPES.items()}
GOOD = {"heads": ("1111", "0110", "0000"), "mlps": "110"}
FACTS = {"task": "rte", "method": "importance", "seed": 42, "level": 1, "run": "r", "step": 7}


def units(heads: tuple[str, ...], mlps: str) -> Mask:
    rows = [[c == "1" for c in row] for row in heads]
    return Mask({"heads": torch.tensor(rows), "mlps": torch.tensor([c == "1" for c in mlps])}, FACTS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with masks of units, of weights, and weights."""
    monkeypatch.chdir(tmp_path)
    lower(units(**GOOD), WEIGHTS).write("good")
    lower(units(("1010", "0111", "0000"), "011"), WEIGHTS).write("other")
    lower(units(**GOOD), WEIGHTS, "drop").write("dropped")
    eight = units(("11110000",) * 3, "110")
    lower(eight, WEIGHTS).write("eight heads")
    generator = torch.Generator().manual_seed(0)
    pooled = {"bert.pooler.dense.weight": torch.zeros(8, 8), **WEIGHTS}
    for name in ("weights 1", "weights 2"):
        found = {key: torch.rand(tensor.shape, generator=generator) < 0.4 for key, tensor in pooled.items()}
        Mask(found, FACTS | {"method": "guarded-magnitude"}).write(name)
    Mask(dict(lower(units(**GOOD), WEIGHTS))).write("same tensors")
    drawn = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in pooled.items()}
    save_file(drawn, "weights")
    save_file({key.removeprefix("bert."): tensor for key, tensor in drawn.items()} | EMBEDDINGS, "model")
    save_file({key: tensor for key, tensor in drawn.items() if "pooler" not in key} | EMBEDDINGS, "no pooler")
    save_file(drawn | {"bert.pooler.dense.weight": torch.full((8, 8), float("nan"))}, "nan")
    return tmp_path


EMBEDDINGS = {"embeddings.word_embeddings.weight": torch.ones(3, 8)}


def call(line: str, *masks: str) -> None:
    """Run the script on these masks, whose names may have spaces, with `--output o` unless the line has one."""
    kind, *words = line.split()
    words += [] if "--output" in words else ["--output", "o"]
    run_command(lambda: derive.main(derive.parse([kind, *masks, *words])))


def made(line: str, *masks: str) -> Mask:
    with pytest.raises(SystemExit) as end:
        call(line, *masks)
    assert end.value.code == 0
    return Mask.load("o")


@pytest.mark.parametrize("kind", [*derive.OF_ONE, *derive.OF_SEVERAL])
@pytest.mark.parametrize("of", ["units", "weights"])
def test_every_kind_is_a_ticket_over_the_same_tensors(folder, capsys, kind, of):
    files = ("good", "other") if of == "units" else ("weights 1", "weights 2")
    masks = files if kind in derive.OF_SEVERAL else files[:1]
    flags = ["--seed=5"] * (kind in derive.DRAWN and (kind, of) != ("bad", "weights"))
    flags += [f"--like={files[1]}"] * (kind == "resize") + ["--weights=weights"] * ((kind, of) == ("bad", "weights"))
    with pytest.raises(SystemExit, match="0"):
        run_command(lambda: derive.main(derive.parse([kind, *masks, "--output", "o", *flags])))
    found, good = Mask.load("o"), Mask.load(files[0])
    good.check_fits(found, "the ticket")
    facts = {"task": "rte", "method": good.info["method"], "derived": kind}
    facts |= {"units": "heads+mlps", "heads": 4} if of == "units" else {}
    facts |= {"seed": 5} if "--seed=5" in flags else {}
    facts |= {"weights": fingerprint("weights")} if "--weights=weights" in flags else {}
    facts |= {"masks": [fingerprint(file) for file in masks]} | ({"like": fingerprint(files[1])} if kind == "resize" else {})
    assert {key: value for key, value in found.info.items() if key != "overlap"} == facts
    if of == "units":
        assert found == lower(read_units(found), WEIGHTS)  # whole heads and MLPs
        assert {*found.info["overlap"]} == {"heads", "mlps"}
    else:
        assert capsys.readouterr().out.startswith(f"o: keeps {found.kept:,} of {good.total:,} weights")


def test_sizes_and_overlaps_are_printed(folder, capsys):
    made("bad", "good")
    assert capsys.readouterr().out == "o: keeps 6 of 12 heads and 2 of 3 MLPs; shares 0 heads and 1 MLPs with good\n"
    assert Mask.load("o").info["overlap"] == {"heads": 0, "mlps": 1}
    made("union", "good", "other")
    lines = [
        "o: keeps 7 of 12 heads and 3 of 3 MLPs",
        "shares 6 heads and 2 MLPs with good",
        "shares 5 heads and 2 MLPs with other",
    ]
    assert capsys.readouterr().out == "\n  ".join(lines) + "\n"


def test_the_default_seed_is_written(folder):
    assert made("random", "good").info["seed"] == 57
    assert made("random", "good") == made("random --seed 57", "good") != made("random --seed 58", "good")


def test_resize_has_the_size_of_the_other_mask(folder):
    found = read_units(made("resize --like other", "good"))
    assert (int(found["heads"].sum()), int(found["mlps"].sum())) == (5, 2)


def test_the_released_codes_random_sizes_differ(folder):
    sizes = {read_units(made(f"random --random-size binomial --seed {seed}", "good"))["heads"].sum().item() for seed in range(9)}
    assert len(sizes) > 1


def test_a_bias_that_goes_with_a_layers_last_head_does_so_in_the_derived_ticket(folder):
    found = made("complement", "dropped")  # no head is left in layer 0
    assert {name.split(".")[3]: kept.any().item() for name, kept in found.items() if name.endswith(BIAS)} == {
        "0": False,
        "1": True,
        "2": True,
    }
    assert not any(name.endswith(BIAS) for name in made("complement", "good"))


def test_weights_may_be_those_of_any_checkpoint(folder):
    found = made("bad --weights weights", "weights 1")
    assert found == made("bad --weights model", "weights 1")
    assert found.kept == Mask.load("weights 1").kept


@pytest.mark.parametrize(
    ("line", "masks", "message"),
    [
        ("random", ["nothing"], "there is no mask file at nothing"),
        ("random", ["weights"], "weights is damaged, or was not written by bert_tickets"),
        ("super", ["good", "dropped"], f"good and dropped do not fit: the other mask has {LAYER.format(0)}{BIAS}"),
        (
            "union",
            ["good", "eight heads"],
            "one is a mask of heads+mlps (4 heads a layer), the other of heads+mlps (8 heads a layer)",
        ),
        ("resize --like same-tensors", ["good"], "one is a mask of heads+mlps (4 heads a layer), the other of weights"),
        ("super", ["good"], "super takes several masks, and 1 was given"),
        ("bad", ["good", "other"], "bad takes one mask, and 2 were given"),
        ("complement --seed 1", ["good"], "--seed has no effect on complement, only on random, bad, resize, super-random"),
        ("super-bad --seed 1", ["good", "other"], "--seed has no effect on super-bad"),
        ("bad --random-size exact", ["good"], "--random-size has no effect on bad"),
        ("random --weights weights", ["good"], "--weights has no effect on random"),
        ("bad --weights weights", ["good"], "--weights has no effect: good is a mask of heads+mlps (4 heads a layer), whose"),
        ("bad --weights weights --seed 1", ["weights 1"], "--seed has no effect: weights 1 is a mask of weights"),
        ("bad", ["weights 1"], "chosen by magnitude: give --weights"),
        ("bad --weights nothing", ["weights 1"], "nothing: there is no such file"),
        ("bad --weights no-pooler", ["weights 1"], "no-pooler lacks bert.pooler.dense.weight"),
        ("bad --weights nan", ["weights 1"], "bert.pooler.dense.weight of nan is not finite"),
        ("random --like other", ["good"], "--like has no effect on random"),
        ("resize", ["good"], "resize needs --like"),
        ("random --seed -1", ["good"], "must be from 0 to 2^32 - 1"),
        ("random --output ./good", ["good"], "--output good is one of the files to read"),
        ("resize --like other --output link", ["good"], "--output link is one of the files to read"),
        ("random --output /proc/nowhere/o", ["good"], "/proc/nowhere"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(folder, capsys, line, masks, message):
    for name in ("same tensors", "no pooler"):
        (folder / name).rename(folder / name.replace(" ", "-"))
    (folder / "link").symlink_to("other")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as end:
        call(line, *masks)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
