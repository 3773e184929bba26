"""The command line: every field has a flag, a mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import GIVEN, OF_IMP

from bert_tickets.cli import flags, parse, run_command
from bert_tickets.config import TASKS, fields_of, flat, methods, run_name
from bert_tickets.errors import Busy, Stopped, UserError
from bert_tickets.methods.main import run

METHODS = {"imp": OF_IMP, "transfer": {"mask": "mask.pt"}}


def words(**given):
    """The flags of these values."""
    found = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        found += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def refusal(capsys, kind, *arguments):
    """The last line that the command line prints when it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        parse(kind, None, arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


# ---- help ----

HELP = ["lt_glue.py", "lt_squad.py", "lt_pretrain.py", "lt_glue.py --method transfer", "lt_pretrain.py --method transfer"]
HELP += ["oneshot.py", "perturb_weight.py", "scripts/compare.py", "scripts/verify.py", "scripts/export.py"]
HEAVY = {"torch", "transformers", "numpy", "datasets", "evaluate", "scipy", "sklearn", "safetensors", "pandas", "ray"}


@pytest.mark.parametrize("line", HELP)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "absent"), [("glue", {"doc_stride"}), ("squad", {"task"}), ("mlm", {"task", "doc_stride"})])
def test_every_field_has_a_flag_with_a_help_text(kind, absent, method, capsys):
    assert flags(kind, method).keys() == fields_of(method).keys() - absent
    with pytest.raises(SystemExit) as stop:
        parse(kind, "What it does: 100% of it.", ["--method", method, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "100% of it" in out
    assert not any(f"--{field.replace('_', '-')}" in out for field in absent)
    for field in flags(kind, method):
        flag = "--" + field.replace("_", "-")
        entry = re.search(rf"^  {flag}[ ,\n].*?(?=^  --|\Z)", out, re.MULTILINE | re.DOTALL)
        assert entry, flag
        assert len(entry.group().split()) >= 4, flag
    assert kind != "glue" or all(task in out for task in TASKS["glue"])


# ---- flags ----


@pytest.mark.parametrize("method", METHODS)
def test_the_values_of_this_test_cover_every_field_and_no_default(method):
    assert GIVEN.keys() | METHODS[method].keys() | {"method"} == flags("glue", method).keys()
    defaults = flat(parse("glue", None, words(task="rte", **({"mask": "m"} if method == "transfer" else {}))))
    assert [field for field, value in (GIVEN | METHODS[method]).items() if value == defaults[field]] == []


@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, own in METHODS.items() for field in [*GIVEN, *own]], ids=str
)
def test_every_flag_sets_its_field_and_no_other(method, field):
    plain = {"task": "rte"} | ({"mask": "m"} if method == "transfer" else {})
    value = (GIVEN | METHODS[method])[field]
    before, after = (flat(parse("glue", None, words(**values))) for values in (plain, plain | {field: value}))
    quirks = {"rewind_head", "decay"} if (field, method) == ("protocol", "imp") else set()
    assert after[field] == value
    assert after["method"] == method
    assert {name for name in after if after[name] != before[name]} == {field} | quirks


def test_a_mask_implies_the_method_transfer():
    for line in ("--mask m.pt", "--mask=m.pt", "--method transfer --mask m.pt", "--method=transfer --mask m.pt"):
        cfg = parse("glue", None, ["--task", "rte", *line.split()])
        assert (cfg.method, cfg.settings.mask) == ("transfer", "m.pt")


def test_underscores_and_hyphens_are_the_same():
    underscored = ["--task=rte", "--batch_size", "16", "--max_length=64", "--no_rewind_head", "--output_dir=a_b/c-d"]
    hyphenated = ["--task=rte", "--batch-size", "16", "--max-length=64", "--no-rewind-head", "--output-dir=a_b/c-d"]
    assert parse("glue", None, underscored) == parse("glue", None, hyphenated)
    assert parse("glue", None, underscored).output_dir == "a_b/c-d"  # values stay as they are


@pytest.mark.parametrize(("written", "task"), [("MNLI", "mnli"), ("SST-2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola")])
def test_a_task_may_be_written_as_in_the_papers(written, task):
    assert parse("glue", None, ["--task", written]).task == task


def test_sys_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lt_glue.py", "--task", "wnli", "--batch_size", "8"])
    assert (parse("glue", None).task, parse("glue", None).train.batch_size) == ("wnli", 8)


def test_squad_has_no_task_flag_and_a_stride():
    cfg = parse("squad", None, ["--doc_stride", "64"])
    assert (cfg.task, cfg.doc_stride, cfg.max_length) == ("squad", 64, 384)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--task rte --learning-rate 1", "unrecognized argument --learning-rate"),
        ("--task rte --batch 3", "unrecognized argument --batch"),  # abbreviations would change with later flags
        ("--task rte --lr", "--lr: expected one argument"),
        ("--task rte --lr fast", "--lr: invalid float value: 'fast'"),
        ("--task rte --levels 2.5", "--levels: invalid int value: '2.5'"),
        ("--task rte --protocol mine", "--protocol: invalid choice: 'mine'"),
        ("--task rte --prunable all", "--prunable: invalid choice: 'all'"),
        ("rte", "unrecognized argument rte"),
        ("--task rte --doc-stride 64", "unrecognized argument --doc-stride"),
        ("", "--task is required, one of cola, sst2"),
        ("--task imdb", "there is no task 'imdb'; the tasks are cola, sst2"),
        ("--task squad", "there is no task 'squad'; the tasks are cola"),
        ("--task rte --method lasso", "there is no method lasso for this script; the methods are imp, transfer"),
        ("--task rte --method", "there is no method"),
        ("--task rte --method transfer", "the following arguments are required: --mask"),
        ("--task rte --method imp --mask m", "--mask belongs to --method transfer, and this is --method imp"),
        ("--task rte --mask m --levels 3", "--levels belongs to --method imp, and this is --method transfer"),
        ("--task rte --mask m --rewind=5", "--rewind=5 belongs to --method imp"),
        ("--task rte --mask m --no-rewind-head", "--no-rewind-head belongs to --method imp"),
        ("--task rte --rewind none --no-rewind-head", "--rewind-head has no effect with --rewind none"),
        ("--task rte --epochs 1 --max-steps 10", "--epochs has no effect with --max-steps"),
        ("--task rte --grad-accum 33", "--grad-accum 33: --batch-size is 32"),
        ("--task rte --levels 11", "--levels 11: the last one would prune 100% of the weights; --rate 0.1 allows 10 levels"),
    ],
)
def test_a_wrong_flag_is_named(capsys, line, said):
    assert said in refusal(capsys, "glue", *line.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--task squad", "unrecognized argument --task"),
        ("--doc-stride 0", "--doc-stride 0: must be from 1 to 317"),
        ("--doc-stride 318", "--doc-stride 318: must be from 1 to 317"),
        ("--max-length 128", "--doc-stride 128: must be from 1 to 61, or windows would miss text"),
        ("--max-length 67", "--max-length 67: must be at least 68"),
    ],
)
def test_windows_that_would_miss_text_are_refused(line, said, capsys):
    assert said in refusal(capsys, "squad", *line.split())
    assert parse("squad", None, ["--max-length", "128", "--doc-stride", "61"]).doc_stride == 61


OUT_OF_RANGE = {"rate": "0 1 -0.1 1.5 nan inf", "levels": "0 -1 1000", "epochs": "0 -1 nan inf", "lr": "0 -1e-5 nan inf"}
OUT_OF_RANGE |= {"rewind": "-1 100% -5% nan% inf% % 1.5 soon None", "weight_decay": "-0.1 1 nan", "seed": f"-1 {2**32}"}
OUT_OF_RANGE |= {"max_length": "2", "limit_eval": "-1", "max_grad_norm": "0 nan", "save_minutes": "0 nan", "adam_epsilon": "0"}
OUT_OF_RANGE |= dict.fromkeys(("batch_size", "grad_accum", "max_steps", "limit_train", "log_every", "save_steps"), "0")
CASES = [(field, value) for field, values in OUT_OF_RANGE.items() for value in values.split()]
CASES += [
    (field, value) for field in ("model", "data_dir", "output_dir", "init", "device", "mask", "rewind") for value in ("", " ")
]


@pytest.mark.parametrize(("field", "value"), CASES)
def test_a_value_out_of_range_names_the_flag(capsys, field, value):
    flag = "--" + field.replace("_", "-")
    said = refusal(capsys, "glue", "--task", "rte", f"{flag}={value}").partition("error: ")[2]
    assert said.startswith(flag)
    assert len(said.split()) >= 4


NONSENSE = st.one_of(
    st.sampled_from(["", "-1", "0", "1", "nan", "inf", "1e400", "1e308", "1e-320", "-0.0", "0x10", "1_000", "9" * 5000]),
    st.sampled_from(["10000000000", "0.999999999999", "1.5", "5%", "100%", "-5%", "nan%", "none", "random", "geometric"]),
    st.sampled_from(["../..", "/", "~", "--", "-h", "x" * 5000, " ", "cuda:-1", "true"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
    st.floats().map(str),
    st.integers().map(str),
)


@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nonsense_gives_a_plan_or_exit_code_2_at_once(kind, data):
    method = data.draw(st.sampled_from(methods(kind)))
    names = st.sampled_from([name.replace("_", "-") for name in flags(kind, method) if name != "method"])
    given_words = data.draw(st.lists(st.builds("--{}={}".format, names, NONSENSE), min_size=1, max_size=3))
    task = ["--task", "rte"] if kind == "glue" else []
    mask = ["--mask", "m"] if method == "transfer" else []
    began, said = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
        run_command(run, parse(kind, None, [*task, *mask, "--dry-run", *given_words]))
    assert stop.value.code in (0, 2)
    assert "error: " in said.getvalue() or stop.value.code == 0
    assert time.process_time() - began < 1


def test_dry_run_prints_the_plan_and_makes_no_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = parse("glue", None, ["--task", "rte", "--dry-run", "--lr", "3e-5", "--levels", "3"])
    run(cfg)
    out = capsys.readouterr().out
    assert f"would run in runs/{run_name(cfg)}" in out
    assert "  lr = 3e-05" in out
    assert "level 2: 20.0% pruned (0.1111 of the remaining weights)" in out
    run(parse("glue", None, ["--task", "rte", "--dry-run", "--mask", "m.pt"]))
    assert "train the ticket m.pt once" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---- exit codes ----

INTACT = ". Complete files are intact; the same command can be given again.\n"


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


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_on_a_full_disk_is_exit_code_2(stream):
    program = (
        f"from bert_tickets.cli import run_command; import sys; run_command(lambda: print(1, file=sys.{stream}, flush=True))"
    )
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, **{stream: full}, check=False)
    assert ran.returncode == 2


def test_a_reader_that_closed_its_end_is_no_error():
    program = "from bert_tickets.cli import run_command; run_command(lambda: [print('line ' * 99) for _ in range(9999)])"
    ran = subprocess.run(f'{sys.executable} -c "{program}" | head -1; exit ${{PIPESTATUS[0]}}', cwd=ROOT, shell=True,
                         executable="/bin/bash", capture_output=True, text=True, env=os.environ)  # fmt: skip
    assert (ran.returncode, ran.stderr) == (141, "")
