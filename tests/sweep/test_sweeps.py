"""The sweeps in bash: what they print is what the scripts take, in an order in which it can run, and they run it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_tickets.cli import parse
from bert_tickets.config import run_name

ROOT = Path(__file__).parent.parent
PRESETS = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}
SWEEPS = ["table2", "transfer", "rewinding", "oneshot", "similarity", "mlm", "perturbed"]
SMALL = {"TASKS": "rte squad mlm", "SEEDS": "1 2"}
TABLE_2 = {"mnli": 70, "qqp": 90, "stsb": 50, "wnli": 90, "qnli": 70, "mrpc": 50, "rte": 60, "sst2": 60, "cola": 50}


def sweep(name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def lines(name: str, *flags: str, **variables: str) -> list[list[str]]:
    found = sweep(name, "--dry-run", *flags, **variables)
    assert found.returncode == 0, found.stderr
    return [shlex.split(line)[1:] for line in found.stdout.splitlines()]


def flag(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def made(words: list[str]) -> str:
    """What a command makes: a run's directory, or the file it writes."""
    if words[0] not in PRESETS:
        return flag(words, "--output")
    cfg = parse(PRESETS[words[0]], None, words[1:])
    return f"{cfg.output_dir}/{run_name(cfg, PRESETS[words[0]])}"


@pytest.mark.parametrize("name", SWEEPS)
def test_what_a_command_needs_is_made_by_one_before_it(name):
    there: list[str] = []
    for words in lines(name, **SMALL):
        for needed in (flag(words, "--mask"), flag(words, "--init")):
            assert needed in (None, "random") or any(needed == path or needed.startswith(f"{path}/") for path in there), words
        there.append(made(words))
    assert len(there) == len(set(there))


@pytest.mark.parametrize("name", SWEEPS)
def test_stages_are_the_whole_and_the_first_needs_nothing(name):
    whole = lines(name, **SMALL)
    first, second, third = (lines(name, "--stage", str(stage), **SMALL) for stage in (1, 2, 3))
    assert sorted(first + second + third) == sorted(whole)
    assert not any(flag(words, "--mask") for words in first)
    assert first


@pytest.mark.parametrize("name", SWEEPS)
def test_no_command_comes_twice(name):
    whole = [" ".join(words) for words in lines(name, **SMALL)]
    assert len(whole) == len(set(whole))


@pytest.mark.parametrize("name", SWEEPS)
def test_help_says_what_it_is_and_its_variables(name):
    found = sweep(name, "--help")
    assert found.returncode == 0
    assert "SEEDS" in found.stdout
    assert "--dry-run" in found.stdout


def test_table_2_is_as_published():
    whole = lines("table2", SEEDS="57")
    assert len(whole) == 11 * 4 + 5 + 1  # of each task IMP and three controls; masks at five sparsities; shuffled weights
    for task, percent in TABLE_2.items():
        given = [words for words in whole if flag(words, "--task") == task and "--mask" in words]
        assert len(given) == 3
        assert all(f"level_0{percent // 10}" in words[words.index("--mask") + 1] for words in given if "--init" in words)
    assert sum("--mask" in words for words in lines("transfer", SEEDS="57")) == 11 * 10 + 11


def test_flags_may_hold_spaces():
    for words in lines("similarity", TASKS="rte", SEEDS="1", FLAGS="--data-dir 'my data' --model 'a model'"):
        assert flag(words, "--data-dir") == "my data"
        assert flag(words, "--model") == "a model"


def test_a_command_that_is_killed_stops_no_other_and_one_that_is_stopped_does(tmp_path):
    """137 is what the kernel leaves of a process that took too much memory; 143 is a run that saved and ended."""
    for code, calls in ((137, 4), (143, 1)):
        stub = tmp_path / "python"
        script = f'[[ "$*" == *--dry-run ]] && echo "would run in runs/x" && exit; echo called >> {tmp_path}/{code}; exit {code}'
        stub.write_text(f"#!/usr/bin/env bash\n{script}\n")
        stub.chmod(0o755)
        found = sweep("rewinding", TASKS="rte", SEEDS="1", REWIND="5% none", PYTHON=str(stub))
        assert (tmp_path / str(code)).read_text().count("called") == calls, found.stderr
        assert found.returncode == (1 if code == 137 else 143)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_asks_a_sweep_to_stop_reaches_its_command_once_and_is_waited_for(tmp_path, number):
    """A sweep whose interpreter is a stub, which takes a second to save."""
    stub, told = tmp_path / "python", tmp_path / "told"
    stub.write_text(
        f"""#!/usr/bin/env bash
[[ "$*" == *--dry-run ]] && echo "would run in runs/x" && exit
for name in INT TERM HUP; do trap "echo $name >> {told}; sleep 1; echo saved >> {told}; exit 143" $name; done
echo began >> {told}
for i in {{1..600}}; do sleep 0.05; done
"""
    )
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "rewinding.sh")]
    words = {"PYTHON": str(stub), "TASKS": "rte", "SEEDS": "1", "REWIND": "5% none"}
    heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # these tests may have been started deaf, by nohup or &
    with subprocess.Popen(command, env=os.environ | words, text=True, stderr=subprocess.PIPE, **heard) as process:
        deadline = time.monotonic() + 60
        while not told.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert told.read_text().split() == ["began", signal.Signals(number).name.removeprefix("SIG"), "saved"]
    assert process.returncode == 143
    assert "stopped; the same command goes on" in said


def test_variables_reach_the_commands():
    whole = lines(
        "table2", MODEL="a model", TASKS="rte mlm", SEEDS="3", STEP="20", LEVELS="4", SPARSITY="40", OUTPUT="o",
        FLAGS="--lr 1e-4", MLM_FLAGS="--data-dir text",
    )  # fmt: skip
    assert all(flag(words, "--model") == "a model" for words in whole)
    trained = [words for words in whole if words[0] in PRESETS]
    assert all(flag(words, "--lr") == "1e-4" and flag(words, "--output-dir") == "o" for words in trained)
    assert [words[0] for words in trained if flag(words, "--data-dir") == "text"] == ["lt_pretrain.py"] * 4
    found = [words for words in trained if "--mask" not in words]
    assert all((flag(words, "--rate"), flag(words, "--levels")) == ("0.2", "4") for words in found)
    assert all("level_02" in words[words.index("--mask") + 1] for words in trained if "--init" in words)


@pytest.mark.parametrize(
    ("variables", "flags", "words"),
    [
        ({}, ["--dry"], "--dry is no flag of this sweep"),
        ({}, ["--stage", "4"], "--stage 1, 2 or 3 is needed"),
        ({"STEP": "ten"}, [], "STEP=ten: whole percents"),
        ({"STEP": "20", "SPARSITY": "50"}, ["--dry-run"], "no level removes 50 %"),
        ({"STEP": "5", "SPARSITY": "60"}, ["--dry-run"], "60 % is removed at level 12, and a run has 10 levels: set LEVELS"),
        ({"LEVELS": "4", "SPARSITY": "60"}, ["--dry-run"], "60 % is removed at level 6, and a run has 4 levels: set LEVELS"),
        ({"STEP": "08"}, ["--dry-run"], "STEP=08: whole percents from 1 to 99 are needed"),
        ({"SPARSITY": "100"}, ["--dry-run"], "SPARSITY=100: whole percents from 1 to 99 are needed"),
        ({"FLAGS": "--schedule geometric"}, ["--dry-run"], "a sweep's levels are of --schedule linear"),
        ({"MLM_FLAGS": "--lr 1e-4 --rate 0.2"}, ["--dry-run"], "--rate and --levels of a sweep are its variables STEP"),
        ({"STEP": "20", "SPARSITY": "50"}, [], "no level removes 50 %"),
        ({"FLAGS": "--frobnicate"}, ["--dry-run"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_users_mistake_is_a_sentence(variables, flags, words):
    found = sweep("table2", *flags, **{"TASKS": "rte", "SEEDS": "1"} | variables)
    assert found.returncode == 2
    assert words in found.stderr
