"""The command line: every field has a flag with an effect, a mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import compare
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import GIVEN, NEEDED, OF_IMP

import oneshot
from bert_tickets import cli
from bert_tickets.cli import flags, parse, run_command
from bert_tickets.config import TASKS, flat, methods
from bert_tickets.errors import Busy, Stopped, UserError
from bert_tickets.methods.main import run
from bert_tickets.runs.naming import run_name

METHODS = {"imp": OF_IMP, "transfer": {"mask": "mask.pt", "execution": "slim"}}


def words(**given):
    """The flags of these values."""
    found = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        found += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


# ---- help ----

HEAVY = {"torch", "transformers", "numpy", "datasets", "evaluate", "scipy", "sklearn", "safetensors", "pandas", "ray"}
SCRIPTS = ["lt_glue.py", "lt_pretrain.py --method transfer", "oneshot.py", "perturb_weight.py"]
SCRIPTS += ["scripts/compare.py", "scripts/derive.py", "scripts/verify.py", "scripts/export.py"]


@pytest.mark.parametrize("line", SCRIPTS)
def test_help_answers_in_a_third_of_a_second_and_imports_nothing_heavy(line):
    script, *more = line.split()
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *more, "--help"]
    spent = [1.0]
    while spent[-1] > 0.3 and len(spent) < 4:  # another try: other processes may use the machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert ran.returncode == 0
    assert "usage: " in ran.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint(HEAVY)
    assert min(spent) < 0.3


@pytest.mark.parametrize("script", ["oneshot.py --rate 0.5", "perturb_weight.py --noise 1", "scripts/tables.py a"])
def test_no_script_takes_abbreviations(script):
    name, *more = script.split()
    ran = subprocess.run([sys.executable, str(ROOT / name), *more, "--outp", "x"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1


def default_of(capsys, kind: str, *line: str, flag: str) -> str:
    """What --help says of a flag's default."""
    with pytest.raises(SystemExit):
        parse(kind, None, [*line, "--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    return text.partition(f" --{flag} ")[2].partition(" --")[0].partition("(default: ")[2].partition(")")[0]


def test_help_prints_the_defaults_of_the_flags_given(capsys):
    training = ("--method", "mask_training")
    assert default_of(capsys, "squad", flag="epochs") == "2.0"
    assert default_of(capsys, "squad", "--protocol=released", flag="epochs") == "4.0"
    assert default_of(capsys, "mlm", *training, flag="refresh") == "1000"
    assert default_of(capsys, "mlm", *training, "--objective", "kd", flag="refresh") == "100"
    assert default_of(capsys, "mlm", *training, flag="ticket-step") == ""
    assert default_of(capsys, "mlm", *training, "--sparsity", "0.70", flag="ticket-step") == "17000"


# ---- flags ----


@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, own in METHODS.items() for field in [*GIVEN, *own]], ids=str
)
def test_every_flag_sets_its_field_and_no_other(method, field):
    plain = {"task": "rte"} | ({"mask": "m"} if method == "transfer" else {}) | NEEDED.get(field, {})
    values = GIVEN | METHODS[method]
    assert values.keys() | {"method"} == flags("glue", method).keys()
    before, after = (flat(parse("glue", None, words(**given))) for given in (plain, plain | {field: values[field]}))
    quirks = {"rewind_head", "decay"} if (field, method) == ("protocol", "imp") else set()
    assert after["method"] == method  # --mask implies transfer
    assert after[field] == values[field]
    assert {name for name in after if after[name] != before[name]} == {field} | quirks


def test_an_unreadable_preset_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "methods", MagicMock(side_effect=OSError(5, "Input/output error", "imp.toml")))
    with pytest.raises(SystemExit, match="2"):
        parse("glue", None, words(task="rte"))
    assert capsys.readouterr().err == "error: [Errno 5] Input/output error: 'imp.toml'\n"


def test_other_spellings_of_a_flag_or_a_task_are_accepted():
    underscored = parse("glue", None, ["--task=SST-2", "--batch_size", "16", "--no_rewind_head", "--output_dir=a_b/c-d"])
    assert underscored == parse("glue", None, ["--task=sst2", "--batch-size", "16", "--no-rewind-head", "--output-dir=a_b/c-d"])
    assert underscored.output_dir == "a_b/c-d"  # values stay as they are


@pytest.mark.parametrize("path", ["~", "~/a_b", "nobody~/x", "./~/x"])
def test_the_home_folder_may_be_written_as_a_tilde_in_every_path(monkeypatch, path):
    """Also behind `=` and in quotes, where a shell does not replace it."""
    monkeypatch.setenv("HOME", "/home/of/me")
    full = path.replace("~", "/home/of/me", 1) if path in ("~", "~/a_b") else path
    for name in ("model", "data_dir", "output_dir", "init", "mask"):
        flag = name.replace("_", "-")
        for more in ([f"--{flag}={path}"], [f"--{name}={path}"], [f"--{flag}", path]):
            assert flat(parse("glue", None, ["--task", "rte", "--mask", "m", *more]))[name] == full
    args = oneshot.parse([f"--model={path}", "--rate=0.5", "--init", path, "--output", path])
    assert (args.model, args.init, args.output) == (full, full, full)
    compared = compare.parse([path, f"{path}/x", f"--csv={path}"])
    assert (compared.masks, compared.csv) == ([Path(full), Path(full, "x")], Path(full))


def test_a_home_folder_that_does_not_exist_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("glue", None, ["--task", "rte", "--output-dir=~no-such-user/x"])
    assert stop.value.code == 2
    assert "~no-such-user/x: there is no user of this name" in capsys.readouterr().err
    assert compare.parse(["a", "b", "--csv", "~70 % pruned"]).csv == Path("~70 % pruned")  # no home folder


def test_a_script_runs_without_its_standard_streams(tmp_path):
    """As some daemons start programs."""
    opened = "print(open('t', 'w').fileno(), file=open('number', 'w'))"  # not 0, 1 or 2, to which libraries write
    program = f"from bert_tickets.cli import run_command; run_command(lambda: (print('a'), {opened}))"
    command = f'{sys.executable} -c "{program}" <&- >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert int((tmp_path / "number").read_text()) > 2
    assert (tmp_path / "t").read_text() == ""


# ---- mistakes ----

MISTAKES = [
    ("glue", "--task rte --batch 3", "unrecognized argument --batch"),  # abbreviations would change with later flags
    ("glue", "--task rte --lr fast", "--lr: invalid float value: 'fast'"),
    ("glue", "--task rte --prunable all", "--prunable: invalid choice: 'all'"),
    ("glue", "--task rte --doc-stride 64", "unrecognized argument --doc-stride"),
    ("glue", "", "--task is required, one of cola, sst2"),
    ("glue", "--task imdb", "there is no task 'imdb'; the tasks are cola, sst2"),
    (
        "glue",
        "--task rte --method lasso",
        "there is no method lasso for this script; the methods are early_bird, guarded_magnitude, imp, importance",
    ),
    ("glue", "--task rte --method transfer", "the following arguments are required: --mask"),
    ("glue", "--task rte --method imp --mask m", "--mask belongs to --method score or transfer, and this is --method imp"),
    ("glue", "--task rte --mask m --no-rewind-head", "--no-rewind-head belongs to --method imp"),
    ("glue", "--task rte --rewind none --no-rewind-head", "--rewind-head has no effect with --rewind none"),
    ("glue", "--task rte --epochs 1 --max-steps 10", "--epochs has no effect with --max-steps"),
    ("glue", "--task rte --protocol=--", "--protocol: expected one argument"),
    ("glue", "--task rte --grad-accum 33", "--grad-accum 33: --batch-size is 32"),
    ("glue", "--task rte --report best", "--report best: needs --eval-steps; otherwise a level has one evaluation"),
    ("glue", "--task rte --limit-seed run", "--limit-seed run: has no effect without --limit-train"),
    ("mlm", "--limit-seed run --limit-train 9", "--limit-seed run: has no effect on mlm, which takes the first blocks"),
    ("glue", "--task rte --levels 11", "would prune 100% of the weights; --rate 0.1 allows 10 levels"),
    ("squad", "--doc-stride 318", "--doc-stride 318: must be from 1 to 317"),
    ("squad", "--max-length 67", "--max-length 67: must be at least 68"),
]
OUT_OF_RANGE = {"rate": "0 1 nan", "levels": "0 1000", "epochs": "0 nan inf", "lr": "-1e-5 inf", "weight_decay": "-0.1 1 nan"}
OUT_OF_RANGE |= {"rewind": "-1 100% -5% nan% 1.5 soon", "seed": f"-1 {2**32}", "max_length": "2", "limit_eval": "-1"}
OUT_OF_RANGE |= dict.fromkeys(
    ("batch_size", "grad_accum", "max_steps", "limit_train", "log_every", "save_steps", "eval_steps"), "0"
)
OUT_OF_RANGE |= dict.fromkeys(("max_grad_norm", "save_minutes", "adam_epsilon"), "0")
for name, values in OUT_OF_RANGE.items():
    flag = f"--{name.replace('_', '-')}"
    MISTAKES += [("glue", f"--task rte {flag}={value}", flag) for value in values.split()]
for name in ("model", "data-dir", "output-dir", "init", "device", "mask", "rewind"):  # an unset shell variable
    MISTAKES.append(("glue", f"--task rte --{name}=", f"--{name}"))


@pytest.mark.parametrize(("kind", "line", "said"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag(capsys, kind, line, said):
    with pytest.raises(SystemExit) as stop:
        parse(kind, None, line.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert len(err.split()) >= 5  # the flag alone says too little


WORDS = ["", " ", "-1", "nan", "inf", "1e400", "1e-320", "0x10", "9" * 5000, "0.999999999999", "100%", "nan%", "none"]
WORDS += ["~", "--", "-h"]
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
NONSENSE = st.one_of(st.sampled_from(WORDS), TEXTS, st.floats().map(str), st.integers().map(str))


@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nonsense_gives_a_plan_or_exit_code_2(kind, data):
    method = data.draw(st.sampled_from(methods(kind)))
    names = st.sampled_from([name.replace("_", "-") for name in flags(kind, method) if name != "method"])
    given_words = data.draw(st.lists(st.builds("--{}={}".format, names, NONSENSE), min_size=1, max_size=3))
    plain = ["--dry-run"] + ["--task", "rte"] * (kind == "glue") + ["--mask", "m"] * (method == "transfer")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
        run_command(run, parse(kind, None, [*plain, *given_words]))
    assert stop.value.code == 2 if "error: " in said.getvalue() else stop.value.code == 0


def test_dry_run_prints_the_plan_and_makes_no_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = parse("glue", None, ["--task", "rte", "--dry-run", "--lr", "3e-5", "--levels", "3"])
    run(cfg)
    run(parse("glue", None, ["--task", "rte", "--dry-run", "--mask", "m.pt"]))
    out = capsys.readouterr().out
    for said in (f"would run in runs/{run_name(cfg)}", "  lr = 3e-05", "level 2: 20.0% pruned (0.1111 of the remaining weights)"):
        assert said in out
    assert "train the ticket m.pt once" in out
    assert list(tmp_path.iterdir()) == []


# ---- exit codes ----

INTACT = ". Complete files are intact; fix the cause and give the same command again.\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("the mask is damaged"), 2, "error: the mask is damaged\n"),
        (Busy("runs/x is in use by process 7"), 75, "error: runs/x is in use by process 7\n"),
        (Stopped("stopped; the same command resumes", 143), 143, "stopped; the same command resumes\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "full", "runs/x"), 2, f"error: [Errno 28] full: 'runs/x'{INTACT}"),
        (None, 0, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, says):
    def main(*arguments: object) -> None:
        print(*arguments)
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main, "a", "b")
    assert (stop.value.code, *capsys.readouterr()) == (code, "a b\n", says)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


@pytest.mark.parametrize(("reader", "code"), [("> /dev/full", 2), ("| head -1; exit ${PIPESTATUS[0]}", 141)])
def test_output_that_nobody_takes_ends_without_a_traceback(reader, code):
    program = "from bert_tickets.cli import run_command; run_command(lambda: [print('line ' * 99) for _ in range(9999)])"
    line = f'{sys.executable} -c "{program}" {reader}'
    ran = subprocess.run(line, cwd=ROOT, shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr
