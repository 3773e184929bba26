"""The figures: the tables behind them, their marks and labels, and files that depend only on their content."""

import re
import shutil
from itertools import product
from pathlib import Path

import figures
import pandas as pd
import pytest
import rundirs

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import LAYER
from bert_tickets.report import figures as figures_of
from bert_tickets.report.pictures import draw_heat_map, ink_on
from bert_tickets.report.results import comparable, read_results


@pytest.fixture
def plot(tmp_path, capsys):
    """Run scripts/figures.py in this process; what it prints."""

    def run(*words: object, output: str = "f.svg") -> str:
        figures.main(figures.parse([*map(str, words), "--output", str(tmp_path / output)]))
        return capsys.readouterr().out

    return run


def lines(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]


def table(out: str) -> dict[str, list[str]]:
    """The lines of a printed table by their first cell."""
    return {first: rest for first, *rest in lines(out)}


def lacks(picture: Path, *words: str) -> list[str]:
    """Those of the words that are not the beginning of a text in the picture."""
    text = picture.read_text()
    return [word for word in words if f">{word}" not in text]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    """Two tasks, two seeds, and of their tickets at 10 % all but one trained on the other task."""
    place = tmp_path_factory.mktemp("grid")
    for seed in (1, 2):
        runs = {task: rundirs.run(place, [0.80, 0.79], task=task, seed=seed) for task in ("sst2", "qqp")}
        warnings = ["all predictions are positive"] * (seed == 2)
        mask = rundirs.mask_of(runs["qqp"], 1)
        rundirs.run(place, [0.70 + 0.02 * seed], task="sst2", seed=seed, mask=mask, warnings=warnings)
        rundirs.run(place, [0.79], task="qqp", seed=seed, mask=rundirs.oneshot(place / "one", 0.1, "magnitude"))
    return place


@pytest.fixture
def grid(made_once, tmp_path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "grid"))


@pytest.mark.parametrize("report", ["best", "last"])
def test_pictures_of_best_scores_say_of_how_many_evaluations(plot, tmp_path, report):
    flags = {"eval_steps": 5, "report": report}
    for (task, other), seed in product((("sst2", "qqp"), ("qqp", "sst2")), (1, 2)):
        run = rundirs.run(tmp_path, [0.8, 0.7], task, seed, **flags)
        moved = rundirs.run(tmp_path, [0.74 + seed / 100], other, seed, mask=rundirs.mask_of(run, 1), **flags)
        for folder, level in ((run, 0), (run, 1), (moved, 0)):
            rundirs.evaluate(folder, level, 0.8 + seed / 100, 20)
    for words in (["curves"], ["transfer", "--sparsity", "10"]):
        out, picture = plot(*words, tmp_path), (tmp_path / "f.svg").read_text()
        for text in (out, picture):
            assert ("best of 20 evaluations" in text) == (report == "best")


def test_curves_have_panels_with_units_and_a_legend(plot, tmp_path):
    for task in ("cola", "sst2", "squad", "mnli"):
        rundirs.run(tmp_path, [0.6, 0.5], task=task)
    failed = rundirs.run(tmp_path, [], "rte", levels=3)
    rundirs.fail(failed, 0, "the loss became nan by step 40")
    out = plot("curves", tmp_path, "--title", "All of them")
    assert f"not drawn: {failed}: level 0 diverged: the loss became nan by step 40" in out
    text = (tmp_path / "f.svg").read_text()
    names = ["MNLI", "SST-2", "CoLA", "SQuAD"]
    assert sorted(names, key=lambda name: text.index(f">{name}<")) == names
    labels = [
        "All of them",
        "pruned weights (%)",
        "accuracy (%)",
        "F1 (%)",
        "Matthews × 100",
        "one seed",
        "full BERT",
        "imp ticket",
    ]
    assert lacks(tmp_path / "f.svg", *labels) == []
    assert "hollow" not in text
    assert text.count(">pruned weights (%)<") == 2  # four panels are two by two


def test_warnings_and_undefined_values_are_hollow_and_named(plot, tmp_path):
    rundirs.run(tmp_path, [0.6, 0.5, 0.4], task="stsb", seed=1)
    rundirs.run(tmp_path, [0.8, None, 0.2], task="stsb", seed=2, warnings=["all predictions are 2.5"])
    out = plot("curves", tmp_path)
    assert "Warning: STS-B, imp ticket at 20 %: seed 2: all predictions are 2.5\n" in out
    svg = (tmp_path / "f.svg").read_text()
    assert "hollow: a value is undefined or has a warning" in svg
    assert svg.count("fill: #ffffff; stroke: #d55e00") == 2  # hollow markers


def test_transfer_is_relative_to_the_full_bert_or_to_the_own_ticket(plot, grid, tmp_path):
    found = table(plot("transfer", grid, "--sparsity", "10"))
    assert found["ticket"] == ["QQP", "SST-2", "at least same-task"]
    assert found["imp ticket of QQP"] == ["-1.00 (2, all equal)", "-7.00 (2, warning)", "0 of 1"]
    assert found["imp ticket of SST-2"] == ["no run", "-1.00 (2, all equal)", "no run"]
    assert found["one-shot pruning"] == ["-1.00 (2, all equal)", "no run", "1 of 1"]
    assert (tmp_path / "f.svg").read_text().count(">no run<") == 2
    labels = ["trained on", "ticket", "−7.0", "±1.4*", "difference to the full BERT"]
    assert lacks(tmp_path / "f.svg", *labels, "mean ± standard deviation of 2 seeds; * a value") == []
    relative = table(plot("transfer", grid, "--sparsity", "10", "--relative", "same-task"))
    assert relative["imp ticket of QQP"][:2] == ["0.00 (2, all equal)", "-6.00 (2, warning)"]


def test_a_sparsity_without_tickets_is_refused_and_a_setting_can_be_chosen(plot, grid):
    for figure in ("overlap", "densities"):
        with pytest.raises(UserError, match="no ticket at 70 % sparsity; the levels of these runs are 10 %"):
            plot(figure, grid, "--sparsity", "70")
    rundirs.run(grid, [0.5, 0.4], task="qqp", seed=1, lr=1e-4)
    assert "40.0 (1)" in plot("curves", grid, "--setting", "lr 0.0001")


def test_overlap_compares_tasks_with_one_seed_and_seeds_of_one_task(plot, grid, tmp_path, monkeypatch):
    found = lines(plot("overlap", grid, "--sparsity", "10"))
    assert found[0] == ["ticket", "and", "pairs", "jaccard", "chance", "chance_by_tensor", "mean_jaccard", "hamming"]
    assert [line[:3] for line in found[1:]] == [["QQP", "QQP", "1"], ["QQP", "SST-2", "2"], ["SST-2", "SST-2", "1"]]
    masks = [Mask.load(next(grid.glob(f"qqp-imp-s{seed}-*")) / "level_01" / "mask.safetensors") for seed in (1, 2)]
    assert found[1][3:5] == [f"{masks[0].overlap(masks[1]):.4f}", "0.8182"]
    assert "diagonal: two seeds of a task" in (tmp_path / "f.svg").read_text()
    apart = [next(grid.glob(name)) for name in ("qqp-imp-s1-*", "sst2-imp-s2-*")]
    assert lines(plot("overlap", *apart, "--sparsity", "10"))[2] == ["QQP", "SST-2", "0", *5 * ["no pair"]]
    monkeypatch.setattr(rundirs, "WEIGHTS", 2000)
    rundirs.run(grid, [0.8, 0.79], task="mnli", seed=1)
    with pytest.raises(UserError, match="the tickets of MNLI and QQP cannot be compared: weight is 1000 in the other mask"):
        plot("overlap", grid, "--sparsity", "10")


def test_densities_are_the_kept_weights_of_layers_and_kinds(plot, tmp_path):
    run = rundirs.run(tmp_path, [0.8], levels=2)
    ones = rundirs.torch.ones(10, dtype=rundirs.torch.bool)
    some = ones.clone()
    some[:4] = False
    kinds = ("attention.self.query", "output.dense")
    names = [f"bert.encoder.layer.{layer}.{kind}.weight" for layer in (0, 1) for kind in kinds]
    mask = Mask({**dict.fromkeys(names, ones), names[1]: some}, {"method": "imp", "task": "sst2"})
    rundirs.write_level(run, 1, mask, 0.7, "sst2")
    assert lines(plot("densities", tmp_path, "--sparsity", "10")) == [
        ["ticket", "layer", "attention.query", "output", "all"],
        ["SST-2", "0", "100.00", "60.00", "80.00"],
        ["SST-2", "1", "100.00", "100.00", "100.00"],
        ["SST-2", "all", "100.00", "80.00", "90.00"],
    ]
    assert lacks(tmp_path / "f.svg", "kept weights (%)", "all weights", "attention.query") == []


def test_densities_of_tickets_that_cover_other_layers_are_places_of_one_axis(tmp_path, monkeypatch):
    """One ticket has no pooler, which is then the last layer of another."""
    layer, pooler = f"{LAYER}0.output.dense.weight", "bert.pooler.dense.weight"
    for method, names in (("imp", [layer, pooler]), ("a", [layer])):
        folder = rundirs.by_hand(tmp_path, "sst2", 1, method, [rundirs.some_mask(0.0)] * 2, [0.8, 0.7], levels=2)
        half = rundirs.torch.arange(10) < 5
        rundirs.write_level(folder, 1, Mask(dict.fromkeys(names, half), {"method": method, "task": "sst2"}), 0.7, "sst2")
    drawn = {}
    monkeypatch.setattr(figures_of, "draw_lines", lambda *given: drawn.update(points=given[3], ticks=given[5]))
    figures_of.draw_densities(comparable(read_results([tmp_path])[0]), tmp_path / "f.svg", None, 0.5)
    assert list(drawn["ticks"].values()) == ["0", "pooler"]
    assert drawn["points"].loc[drawn["points"]["line"] != "all weights", "x"].notna().all()
    assert drawn["points"].loc[drawn["points"]["line"] == "all weights", "x"].isna().all()


# ---- files ----


@pytest.mark.parametrize(("figure", "suffix"), [("curves", ".png"), ("transfer", ".svg"), ("overlap", ".pdf")])
def test_equal_content_gives_equal_files(plot, grid, tmp_path, figure, suffix):
    for name in ("a", "b"):
        plot(figure, grid, *([] if figure == "curves" else ["--sparsity", "10"]), output=name + suffix)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert not re.search(rb"CreationDate|dc:date", (tmp_path / f"a{suffix}").read_bytes())


def test_a_heat_map_writes_readable_values(tmp_path):
    assert (ink_on((1, 1, 0.8, 1)), ink_on((0.1, 0.0, 0.3, 1))) == ("black", "white")
    cells = pd.DataFrame({"row": "c", "column": ["a", "b"], "value": [0.25, float("nan")], "remark": ["note", "none"]})
    draw_heat_map(tmp_path / "f.svg", "title", ("x", "y"), cells, "unit")
    assert lacks(tmp_path / "f.svg", "title", "0.250", "note", "none", "unit", "x", "y") == []
    with pytest.raises(SystemExit):
        figures.parse(["curves", "runs", "--output", "f.jpg"])
