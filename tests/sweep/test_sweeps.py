"""The sweeps in bash: the scripts accept what they print, in an order in which it can run; signals reach the running command."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from sweeps import flag, lines, printed, stub, sweep
from test_jobs import MAKERS
from test_runner import SAVES, wait_for

from bert_tickets.signals import STOP_SIGNALS
from bert_tickets.sweep.jobs import TRAINING, plan

SWEEPS = ["table2", "transfer", "rewinding", "oneshot", "similarity", "mlm", "perturbed", "tamt", "tamt_cost", "tamt_fewshot"]
SWEEPS += ["importance", "stability", "earlybert", "earlybert_ablations", "earlybert_pretrain"]
SMALL = {"TASKS": "rte squad", "SEEDS": "1 2", "SPARSITIES": "40 70", "NOISE": "0.1 1", "RUNS": "2", "SIZES": "100 3000"}
ON_GLUE = {name: {"TASKS": "rte cola", "LONGER": "6"} for name in ("importance", "stability")}
TABLE_2 = {"mnli": 70, "qqp": 90, "stsb": 50, "wnli": 90, "qnli": 70, "mrpc": 50, "rte": 60, "sst2": 60, "cola": 50}


def test_from_another_folder_its_relative_paths_are_refused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for variables in ({"MODEL": "data"}, {"FLAGS": "--data-dir=data"}, {"GLUE_FLAGS": "--data-dir 'data'"}, {"OUTPUT": "out"}):
        found = sweep("table2", "--dry-run", **variables)
        assert found.returncode == 2
        assert f"give an absolute path, or start the sweep in {ROOT}" in found.stderr
    assert printed("table2", TASKS="rte", SEEDS="1", PYTHON=stub(tmp_path), OUTPUT=str(tmp_path / "out"))


def test_help_says_what_a_sweep_is_and_the_defaults_of_its_variables():
    found = sweep("earlybert_ablations", "--help")
    assert found.returncode == 0
    for line in ("EarlyBERT's trade-off and ablations on one task", '  TASKS="qnli"', '  MODEL="bert-base-uncased"'):
        assert line in found.stdout
    assert [line for line in found.stdout.splitlines() if line.startswith("  OUTPUT=")] == ['  OUTPUT="runs_earlybert"']


@pytest.mark.parametrize("name", SWEEPS)
def test_every_line_is_a_job_of_its_own_after_those_that_it_needs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    texts = printed(name, **SMALL | ON_GLUE.get(name, {}))
    jobs = plan(dict(enumerate(texts)), MAKERS)
    assert sorted(job.place for job in jobs) == list(range(len(texts)))
    assert all(job.target for job in jobs)
    assert all(need.place < job.place for job in jobs for need in job.needs)
    assert all(job.needs for job in jobs if "mask" in job.inputs)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_stages_are_the_whole_and_the_first_needs_nothing(name, tmp_path):
    small = SMALL | {"PYTHON": stub(tmp_path)} | ON_GLUE.get(name, {})
    first, second, third = (printed(name, "--stage", stage, **small) for stage in "123")
    assert sorted(first + second + third) == sorted(printed(name, **small))
    assert first
    assert not any("--mask " in line for line in first)


def test_table_2_is_as_published(tmp_path):
    whole = lines("table2", tmp_path, SEEDS="57")
    assert len(whole) == 11 * 4 + 5 + 1  # of each task IMP and three controls; masks at five sparsities; shuffled weights
    for task, percent in TABLE_2.items():
        given = [words for words in whole if flag(words, "--task") == task and "--mask" in words]
        assert len(given) == 3
        assert all(f"level_0{percent // 10}" in words[words.index("--mask") + 1] for words in given if "--init" in words)
    assert sum("--mask" in words for words in lines("transfer", tmp_path, SEEDS="57")) == 11 * 10 + 11


def test_variables_reach_the_commands(tmp_path):
    whole = lines(
        "table2", tmp_path, MODEL="a model", TASKS="rte mlm", SEEDS="3", STEP="20", LEVELS="4", SPARSITY="40", OUTPUT="o",
        FLAGS="--lr 1e-4 --data-dir 'my data'", MLM_FLAGS="--data-dir text",
    )  # fmt: skip
    assert all(flag(words, "--model") == "a model" for words in whole)
    trained = [words for words in whole if words[0] in TRAINING]
    assert all(flag(words, "--lr") == "1e-4" and flag(words, "--output-dir") == "o" for words in trained)
    assert all(flag(words, "--data-dir") == "my data" for words in trained)
    assert [words[0] for words in trained if words.count("--data-dir") == 2] == ["lt_pretrain.py"] * 4
    found = [words for words in trained if "--mask" not in words]
    assert all((flag(words, "--rate"), flag(words, "--levels")) == ("0.2", "4") for words in found)
    assert all("level_02" in words[words.index("--mask") + 1] for words in trained if "--init" in words)


def test_a_check_that_fails_once_does_not_end_the_sweep_as_done(tmp_path):
    python = Path(stub(tmp_path, f'echo "$@" >> {tmp_path}/calls'))
    first, _, rest = python.read_text().partition("\n")
    python.write_text(f"{first}\n[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; exit 1; }}\n{rest}")
    found = sweep("table2", TASKS="rte", SEEDS="1", PYTHON=str(python), OUTPUT=str(tmp_path / "runs"))
    assert found.returncode == 0, found.stderr
    assert any("lt_glue.py" in call for call in (tmp_path / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    ("code", "calls", "ends"), [(137, 4, 1), (255, 4, 1), *((128 + number, 1, 128 + number) for number in STOP_SIGNALS)]
)
def test_a_killed_command_does_not_end_the_sweep_and_a_stopped_one_does(tmp_path, code, calls, ends):
    python = stub(tmp_path, f"echo called >> {tmp_path}/called; exit {code}")
    found = sweep("rewinding", TASKS="rte", SEEDS="1", REWIND="5% none", PYTHON=python)
    assert (tmp_path / "called").read_text().count("called") == calls, found.stderr
    assert found.returncode == ends


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_stops_the_running_command_once_and_the_sweep_waits_for_it(tmp_path, number):
    told, python = tmp_path / "told", stub(tmp_path, f"cd {tmp_path}; {SAVES}")
    variables = {"PYTHON": python, "TASKS": "rte", "SEEDS": "1", "REWIND": "5% none"}
    default = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # nohup and & ignore some signals
    command = ["bash", str(ROOT / "scripts" / "rewinding.sh")]
    with subprocess.Popen(command, env=os.environ | variables, text=True, stderr=subprocess.PIPE, **default) as process:
        wait_for(told.exists)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert told.read_text().split() == ["began", "saved"]
    assert process.returncode == 143
    assert "stopped; the same command resumes" in said


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({}, ["--dry"], "unknown flag --dry"),
        ({"STEP": "20", "SPARSITY": "50"}, [], "no level has 50 % sparsity"),
        ({"STEP": "5", "SPARSITY": "60"}, ["--dry-run"], "60 % is level 12, and a run has 10 levels: set LEVELS"),
        ({"FLAGS": "--schedule geometric"}, ["--dry-run"], "a sweep uses --schedule linear"),
        ({"MLM_FLAGS": "--lr 1e-4 --rate 0.2"}, ["--dry-run"], "give --rate and --levels by the variables STEP"),
        ({"PROTOCOL": "released"}, ["--dry-run"], "this sweep has no PROTOCOL=released"),
        ({"PROTOCOL": "relased"}, ["--dry-run"], "PROTOCOL=relased: must be paper or released"),
        ({"FLAGS": "--model a"}, ["--dry-run"], "by the variables MODEL, SEEDS and OUTPUT"),
        ({"GLUE_FLAGS": "--output_dir=a"}, ["--dry-run"], "by the variables MODEL, SEEDS and OUTPUT"),
        ({"FLAGS": "--init random"}, ["--dry-run"], "a sweep chooses --task and --init itself"),
        ({"FLAGS": "--frobnicate"}, ["--dry-run"], "unrecognized argument --frobnicate"),
    ],
)
def test_a_mistake_in_the_variables_is_one_message_and_exit_code_2(variables, flags, said):
    found = sweep("table2", *flags, **{"TASKS": "rte", "SEEDS": "1"} | variables)
    assert found.returncode == 2
    assert said in found.stderr
