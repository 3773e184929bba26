"""scripts/tables.py: Markdown, LaTeX and CSV of the same numbers, their sources, and mistakes."""

import csv
import io
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
import rundirs
import tables
from conftest import ROOT
from scipy.stats import ttest_rel

from bert_tickets.errors import UserError
from bert_tickets.files import read_json
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import TABLES

TICKET = "imp (rate 0.2) ticket"


@pytest.fixture(scope="module")
def one_task(tmp_path_factory):
    place = tmp_path_factory.mktemp("one")
    rundirs.one_task(place)
    return place


@pytest.fixture(scope="module")
def transfers(tmp_path_factory):
    return rundirs.transfers(tmp_path_factory.mktemp("transfers"))


@pytest.fixture
def command(capsys):
    """Run scripts/tables.py in this process; what it prints."""

    def run(*words: object) -> str:
        tables.main(tables.parse([str(word) for word in words]))
        return capsys.readouterr().out

    return run


def test_csv_goes_back_to_the_runs_in_full_precision(command, one_task):
    rows = csv.DictReader(io.StringIO(command(one_task, "--table", "2", "--format", "csv")))
    found = {(row["row"], row["sparsity"]): row for row in rows}
    full, at_40, at_60 = ([values[level] for values in rundirs.CURVE.values()] for level in (0, 2, 3))
    ticket, values = found[TICKET, "0.4"], [100 * value for value in at_40]
    assert (float(ticket["mean"]), float(ticket["sd"])) == (mean(values), stdev(values))
    assert (ticket["n"], ticket["seeds"], ticket["unit"]) == ("3", "57;58;59", "x 100")
    assert ticket["published"] == "91.9 ± 0.5 at 60 % [fig]"
    assert (ticket["within_one_sd"], ticket["match_or_exceed"], ticket["reference"]) == ("True", "True", FULL)
    tested = 6  # tickets at 20, 40 and 60 %, and three controls
    assert float(found[TICKET, "0.6"]["p_holm"]) == pytest.approx(tested * ttest_rel(at_60, full).pvalue)
    for run, level, sha256 in zip(*(ticket[name].split(";") for name in ("run", "level", "mask_sha256")), strict=True):
        assert read_json(Path(run) / f"level_{int(level):02d}" / "metrics.json")["mask_sha256"] == sha256


def test_sources_name_the_run_level_and_mask_of_each_number(command, one_task):
    _, _, text = command(one_task, "--sources").partition("## Sources of the numbers\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]
    assert len(lines) == len({tuple(line) for line in lines}) == 3 * (4 + 3)  # seeds; levels and controls
    for task, _, sparsity, seed, value, run, level, sha256 in lines:
        said = read_json(Path(run) / f"level_{int(level):02d}" / "metrics.json")
        assert (f"{100 * said['metrics']['accuracy']:.4f}", said["mask_sha256"], task) == (value, sha256, "SST-2")
        assert f"{100 * said['sparsity']:.0f} %" == sparsity
        assert read_json(Path(run) / "run.json")["config"]["seed"] == int(seed)


def test_warnings_are_in_every_format(command, tmp_path):
    warning = "all 872 predictions on validation are negative"
    for seed, values in {57: [0.8, 0.9], 58: [0.82, 0.92]}.items():
        rundirs.run(tmp_path, values, seed=seed, warnings=[warning] * (seed == 58), rate=0.2)
    markdown, latex, lines = (command(tmp_path, "--format", name) for name in ("markdown", "latex", "csv"))
    assert "91.0 ± 1.4 (2, warning) **" in markdown
    assert f"- Warning: SST-2, {TICKET} at 20 %: seed 58: {warning}\n" in markdown
    assert warning in latex
    found = {(row["row"], row["warnings"]) for row in csv.DictReader(io.StringIO(lines))}
    assert {(FULL, ""), (TICKET, f"seed 58: {warning}")} <= found
    assert "20 % (warning; the last level)" in markdown


def test_the_order_of_runs_does_not_matter(command, one_task, transfers):
    runs = [*sorted(one_task.glob("sst2-*")), *sorted(transfers.glob("qqp-*"))]
    for words in (["--sources"], ["--format", "csv"]):
        expected = command(*runs, *words)
        assert command(*reversed(runs), *words) == expected
        assert not re.search(r"\bnan\b|\bNone\b|\bNaN\b", expected)


def test_latex_is_balanced_and_escaped(command, transfers, one_task, tmp_path):
    places = one_task, rundirs.run(tmp_path, [0.3], mask=rundirs.oneshot(tmp_path / "m", 0.5, r"a_b 50% & {x} #1 \ ~ ^ |"))
    text = command(transfers, "--table", "transfer", "--format", "latex") + command(*places, "--table", "2", "--format", "latex")
    text += command(*places, "--table", "curves", "--format", "latex")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert not re.search(r"(?<!\\)[%#]|[^\x00-\x7f]", body)
    begun, ended = (sorted(re.findall(rf"\\{word}\{{(\w+)\}}", body)) for word in ("begin", "end"))
    assert begun == ended
    assert r"a\_b 50\% \& \{x\} \#1" in body
    assert r"\toprule" in body


def test_one_of_several_settings_can_be_chosen(command, tmp_path):
    rundirs.find(tmp_path, {57: [0.8, 0.7]})
    rundirs.find(tmp_path, {57: [0.6, 0.5]}, lr=1e-4)
    command(tmp_path, "--setting", "lr 0.0001", "--table", "curves", "--output", tmp_path / "out" / "t.md")
    shown = (tmp_path / "out" / "t.md").read_text()
    assert "50.0 (1)" in shown
    assert "80.0" not in shown
    assert "SST-2: not the published settings, but lr 0.0001" in shown
    with pytest.raises(UserError, match=r"no run has the setting 'lr 0\.3'"):
        command(tmp_path, "--setting", "lr 0.3")


def test_a_table_without_runs_names_its_sweep(command, tmp_path):
    rundirs.find(tmp_path, {57: [0.8, 0.7]})
    rundirs.fail(rundirs.run(tmp_path, [], "rte", levels=10), 0, "the loss became nan by step 40")
    with pytest.raises(UserError, match=r"(?s)no runs for table 3; make them by: bash scripts/rewinding\.sh.*0 diverged"):
        command(tmp_path, "--table", "3")
    assert all((ROOT / "scripts" / f"{sweep}.sh").exists() for _, sweep in TABLES.values())
    shutil.rmtree(next(tmp_path.glob("sst2-*")))
    with pytest.raises(UserError, match="no runs for any table"):
        command(tmp_path)


@pytest.mark.parametrize("words", ["--sparsity 50", "--table 3 --sparsity 0.5", "--sources --format csv"])
def test_flags_without_effect_are_refused(command, capsys, words):
    with pytest.raises(SystemExit):
        command("runs", *words.split())
    assert "error: --s" in capsys.readouterr().err
