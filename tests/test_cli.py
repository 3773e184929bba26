"""The command line: every field a flag, a mistake a sentence and exit code 2, a configuration a name."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import lt_glue
import lt_pretrain
import lt_squad
from bert_tickets.cli import parse, run_command
from bert_tickets.config import FIELDS, Config, Training, build, flat, identity, offered, preset_values, run_name, tasks
from bert_tickets.errors import Busy, Stopped, UserError
from bert_tickets.tasks.glue import TASKS

GIVEN = {  # a value for every flag of lt_glue.py, none of them its default
    "task": "mrpc",
    "model": "some/folder",
    "data_dir": "glue_data",
    "output_dir": "elsewhere",
    "protocol": "released",
    "init": "random",
    "mask": "mask.pt",
    "levels": 4,
    "rate": 0.05,
    "schedule": "geometric",
    "scope": "tensor",
    "rewind": "5%",
    "prune_first": True,
    "rewind_head": False,
    "decay": "run",
    "reset_optimizer": False,
    "max_length": 64,
    "limit_train": 100,
    "limit_eval": 50,
    "device": "cuda:1",
    "keep_models": True,
    "check_metrics": True,
    "dry_run": True,
    "epochs": 0.5,
    "batch_size": 16,
    "lr": 3e-5,
    "max_steps": 7,
    "weight_decay": 0.01,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "graphs": "off",
    "tf32": True,
    "precision": "bf16",
    "seed": 1,
    "log_every": 10,
    "save_steps": 7,
    "save_minutes": 2.5,
}
NOT_IN_THE_NAME = {"output_dir", "device", "keep_models", "check_metrics", "dry_run", "save_steps", "save_minutes"}


def words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    return [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]


def argv(**given: Any) -> list[str]:
    return [word for name, value in ({"task": "rte"} | given).items() for word in words(name, value)]


def config(*args: str, **given: Any) -> Config:
    return parse("glue", "A test.", [*argv(**given), *args])


def name(*args: str, **given: Any) -> str:
    return run_name(config(*args, **given), "glue")


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What the command line says when it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        parse("glue", None, arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


# ---- help ----


ENTRIES = ["lt_glue.py", "lt_squad.py", "lt_pretrain.py", "oneshot.py", "perturb_weight.py", "scripts/sweep.py"]
HEAVY = {"torch", "transformers", "numpy", "datasets", "evaluate", "scipy", "sklearn", "safetensors", "ray"}


@pytest.mark.parametrize("script", ENTRIES)
def test_help_answers_at_once_and_imports_nothing_heavy(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), "--help"], capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0
    assert "usage: " in ran.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint(HEAVY)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6  # of the processor: others may be at work


@pytest.mark.parametrize(("preset", "absent"), [("glue", {"doc_stride"}), ("squad", {"task"}), ("mlm", {"task", "doc_stride"})])
def test_every_field_has_a_flag_where_it_matters_and_every_flag_a_help_text(preset, absent, capsys):
    fields = {f.name for part in (Config, Training) for f in dataclasses.fields(part)} - {"train"}
    assert set(FIELDS) == fields
    assert set(offered(preset)) == fields - absent
    with pytest.raises(SystemExit) as stop:
        parse(preset, "What it does: 100% of it.", ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "100% of it" in out
    assert not any(f"--{field.replace('_', '-')}" in out for field in absent)
    for field in fields - absent:
        assert FIELDS[field].metadata["help"]
        flag = "--" + field.replace("_", "-")
        entry = re.search(rf"^  {flag}[ ,\n].*?(?=^  --|\Z)", out, re.MULTILINE | re.DOTALL)
        assert entry, flag
        assert len(entry.group().split()) >= 4, flag
    assert preset != "glue" or all(task in out for task in TASKS)


# ---- flags ----


def test_the_values_of_this_test_cover_every_field_and_no_default():
    defaults = flat(config())
    assert set(GIVEN) == set(offered("glue"))
    assert [field for field in GIVEN if GIVEN[field] == defaults[field]] == []


@pytest.mark.parametrize("field", GIVEN)
def test_every_flag_sets_its_field_and_no_other(field):
    plain, given = flat(config()), flat(config(**{field: GIVEN[field]}))
    quirks = {"rewind_head", "decay"} if field == "protocol" else set()
    assert given[field] == GIVEN[field]
    assert {f for f in FIELDS if given[f] != plain[f]} == {field} | quirks


def test_underscores_do_for_hyphens():
    underscored = ["--task=rte", "--batch_size", "16", "--max_length=64", "--no_rewind_head", "--output_dir=a_b/c-d"]
    hyphenated = ["--task=rte", "--batch-size", "16", "--max-length=64", "--no-rewind-head", "--output-dir=a_b/c-d"]
    assert parse("glue", None, underscored) == parse("glue", None, hyphenated)
    assert parse("glue", None, underscored).output_dir == "a_b/c-d"  # values stay as they are


def test_squad_has_no_task_to_choose_and_a_stride_that_is_its_own(capsys):
    cfg = parse("squad", None, ["--doc_stride", "64"])
    assert (cfg.task, cfg.doc_stride, cfg.max_length) == ("squad", 64, 384)
    assert "--doc-stride" in refusal(capsys, ["--task", "rte", "--doc-stride", "64"])
    with pytest.raises(SystemExit):
        parse("squad", None, ["--task", "squad"])
    assert "--task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--doc-stride 0", "--doc-stride 0: from 1 to 317 is needed"),
        ("--doc-stride 318", "--doc-stride 318: from 1 to 317 is needed"),
        ("--max-length 128", "--doc-stride 128: from 1 to 61 is needed: at --max-length 128 windows further apart"),
        ("--max-length 67", "--max-length 67: SQuAD's windows need 68 tokens"),
    ],
)
def test_a_stride_that_could_miss_text_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("squad", None, words.split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert parse("squad", None, ["--max-length", "128", "--doc-stride", "61"]).doc_stride == 61


@pytest.mark.parametrize(("written", "task"), [("MNLI", "mnli"), ("SST-2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola")])
def test_a_task_may_be_written_as_the_papers_do(written, task):
    assert parse("glue", None, ["--task", written]).task == task


def test_the_command_lines_own_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lt_glue.py", "--task", "wnli", "--batch_size", "8"])
    assert (parse("glue", None).task, parse("glue", None).train.batch_size) == ("wnli", 8)


# ---- mistakes ----


@pytest.mark.parametrize("arguments", [["--task", "imdb"], []], ids=["unknown", "none"])
def test_without_a_task_of_glue_the_tasks_are_listed(capsys, arguments):
    said = refusal(capsys, arguments)
    assert all(task in said for task in TASKS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning-rate", "1"], "--learning-rate"),
        (["--batch", "3"], "--batch"),  # no abbreviations: a later flag would change their meaning
        (["--lr"], "--lr"),
        (["--lr", "fast"], "fast"),
        (["--levels", "2.5"], "2.5"),
        (["--protocol", "mine"], "paper"),
        (["--precision", "fp8"], "bf16"),
        (["rte"], "rte"),
    ],
)
def test_a_wrong_flag_is_named(capsys, arguments, named):
    assert named in refusal(capsys, ["--task", "rte", *arguments])


OUT_OF_RANGE = {
    "rate": ["0", "1", "-0.1", "1.5", "nan", "inf"],
    "levels": ["0", "-1"],
    "epochs": ["0", "-1", "nan", "inf"],
    "rewind": ["-1", "100%", "-5%", "nan%", "inf%", "%", "", "1.5", "soon", "None"],
    "lr": ["0", "-1e-5", "nan", "inf"],
    "batch_size": ["0"],
    "max_steps": ["0"],
    "max_length": ["2"],
    "limit_train": ["0"],
    "limit_eval": ["-1"],
    "weight_decay": ["-0.1", "1", "nan"],
    "adam_epsilon": ["0"],
    "max_grad_norm": ["0", "nan"],
    "seed": ["-1", str(2**32)],
    "log_every": ["0"],
    "save_steps": ["0"],
    "save_minutes": ["0", "nan"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_range_is_a_sentence(capsys, field, value):
    flag = "--" + field.replace("_", "-")
    culprit, _, reason = refusal(capsys, ["--task", "rte", f"{flag}={value}"]).partition("error: ")[2].partition(": ")
    assert culprit.split()[0] == flag
    assert len(reason.split()) >= 3


@pytest.mark.parametrize("field", ["model", "data_dir", "output_dir", "init", "mask", "device"])
@pytest.mark.parametrize("value", ["", "  ", "x" * 300])
def test_a_name_that_is_empty_or_none_of_a_file_is_a_sentence(capsys, field, value):
    """`--mask "$MASK"` of a variable that is not set would find a ticket instead of training one."""
    flag = f"--{field.replace('_', '-')}"
    assert f"error: {flag} {value}: " in refusal(capsys, ["--task", "rte", flag, value])


PRESETS = {"glue": lt_glue.main, "squad": lt_squad.main, "mlm": lt_pretrain.main}
NONSENSE = st.one_of(
    st.sampled_from(
        ["", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e400", "1e308", "1e-320", "-0.0", "0x10", "1_000", "9" * 5000]
    ),
    st.sampled_from(["10000000000", "0.999999999999", "1.5", "5%", "100%", "-5%", "nan%", "%", "none", "random", "geometric"]),
    st.sampled_from(
        ["../..", "/", "~", "a\0b", "\ud800", "--", "-h", "x" * 5000, "/dev/zero", "/proc/self/mem", " ", "cuda:-1", "true"]
    ),
    st.text(max_size=6),
    st.floats().map(str),
    st.integers().map(str),
)


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nonsense_is_a_sentence_or_a_plan_at_once(preset, data):
    names = st.sampled_from([name.replace("_", "-") for name in offered(preset)])
    given_words = data.draw(st.lists(st.builds("--{}={}".format, names, NONSENSE), min_size=1, max_size=3))
    began, said, code = time.process_time(), io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            PRESETS[preset](parse(preset, None, [*(["--task", "rte"] if preset == "glue" else []), *given_words, "--dry-run"]))
        except UserError as error:  # run_command prints it
            print(f"error: {error}", file=said)
            code = 2
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2)  # 0 of --help's
    assert "error: " in said.getvalue() or code == 0
    assert time.process_time() - began < 1  # of the processor: others may be at work


def test_a_level_beyond_what_is_left_is_refused_with_the_number_that_can_be(capsys):
    assert "10 levels at most" in refusal(capsys, ["--task", "rte", "--levels", "11"])
    assert config(levels=11, schedule="geometric").levels == 11


@pytest.mark.parametrize("rewind", ["0", "500", "5%", "0.5%", "99.9%", "none"])
def test_all_ways_to_say_where_to_rewind_are_accepted(rewind):
    assert config(rewind=rewind).rewind == rewind


@pytest.mark.parametrize(("rewind", "step"), [("0", 0), ("none", 0), ("20", 20), ("5%", 10), ("0%", 0), ("99%", 198)])
def test_rewinding_is_to_a_step_or_a_share_of_a_level(rewind, step):
    assert Config(task="rte", rewind=rewind).rewind_step(200) == step


@pytest.mark.parametrize("rewind", ["200", "99.9%"])
def test_rewinding_to_a_levels_end_is_refused(rewind):
    with pytest.raises(UserError, match="nothing would be trained"):
        Config(task="rte", rewind=rewind).rewind_step(200)


@pytest.mark.parametrize(
    ("given", "resets"), [({}, True), ({"rewind": "none"}, False), ({"rewind": "none", "reset_optimizer": True}, True)]
)
def test_the_optimiser_is_new_each_level_unless_nothing_is_rewound(given, resets):
    assert config(**given).resets_optimizer is resets


# ---- exit codes ----


@pytest.fixture
def exit_of(capsys, monkeypatch):
    """The exit code of a `main`, and what it left on stdout and stderr."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(main, *arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stop:
            run_command(main, *arguments)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("the disk is full"), 2, "error: the disk is full\n"),
        (Busy("runs/x is in use by process 7 on vm"), 75, "error: runs/x is in use by process 7 on vm\n"),
        (Stopped("stopped; the same command goes on", 143), 143, "stopped; the same command goes on\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_ends_a_run_is_said_on_stderr_and_by_the_exit_code(exit_of, error, code, says):
    def main() -> None:
        raise error

    assert exit_of(main) == (code, "", says)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "no", "runs/x"), "error: the system refuses runs/x: permission is denied. "),
        (OSError(errno.ENOSPC, "full"), "error: the system refuses where the output goes: the disk is full. "),
        (OSError(errno.ENAMETOOLONG, "long", "aaa"), f"error: the system refuses aaa: {os.strerror(errno.ENAMETOOLONG)}. "),
    ],
)
def test_what_the_system_refuses_is_a_sentence(exit_of, error, says):
    def main() -> None:
        raise error

    assert exit_of(main) == (2, "", says + "What was there before is intact; the same command can be given again.\n")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
@pytest.mark.parametrize(("out", "says"), [(True, True), (True, False), (False, True)])
def test_output_on_a_full_disk_is_exit_code_2(out, says):
    """Either stream, or both: also where the refusal comes with the last flush, and nobody can be told."""
    script = "from bert_tickets.cli import run_command; import sys; run_command(lambda: print(*sys.argv, file=sys.stderr))"
    with open("/dev/full", "w") as full:
        end = subprocess.run(
            [sys.executable, "-c", script.replace("sys.stderr)", "sys.stdout)") if out else script],
            stdout=full if out else subprocess.PIPE,
            stderr=subprocess.PIPE if says and out else full,
            text=True,
        )
    assert end.returncode == 2
    if says and out:
        assert end.stderr.startswith("error: the system refuses where the output goes: the disk is full.")


def test_of_what_python_drops_in_a_finaliser_only_a_signal_is_not_shown():
    script = """
from bert_tickets.errors import Stopped
from bert_tickets.cli import run_command
class Thing:
    def __init__(self, error): self.error = error
    def __del__(self): raise self.error
run_command(lambda: [Thing(Stopped("stopped", 143)), Thing(ValueError("a bug"))].clear())
"""
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert end.returncode == 0
    assert "ValueError: a bug" in end.stderr
    assert "Stopped" not in end.stderr


def test_success_is_0_and_main_gets_its_arguments(exit_of):
    assert exit_of(print, "a", "b") == (0, "a b\n", "")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    with pytest.raises(FileNotFoundError):
        run_command(lambda: Path("nowhere").read_text())


def test_dry_run_prints_the_plan_and_makes_no_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = config("--dry-run", lr=3e-5, levels=3)
    lt_glue.main(cfg)
    out = capsys.readouterr().out
    assert f"runs/{run_name(cfg, 'glue')}" in out
    assert "lr = 3e-05" in out
    assert "level 2: remove 0.1111 of what is left: 20.0% pruned" in out
    assert list(tmp_path.iterdir()) == []


# ---- presets ----


def test_the_protocols_differ_exactly_in_the_named_quirks():
    paper, released = (flat(build("glue", {"task": "rte", "protocol": protocol})) for protocol in ("paper", "released"))
    differ = {field: (paper[field], released[field]) for field in paper if paper[field] != released[field]}
    assert differ == {"protocol": ("paper", "released"), "rewind_head": (True, False), "decay": ("level", "run")}


def test_the_papers_settings_are_those_of_table_1():
    given = {"epochs": 3.0, "batch_size": 32, "lr": 2e-5, "max_length": 128, "levels": 10, "rate": 0.1, "schedule": "linear"}
    given |= {"adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0, "scope": "global", "rewind": "0"}
    assert {field: flat(config())[field] for field in given} == given


def test_squads_settings_are_those_of_table_1_and_of_the_released_readme():
    paper, released = (flat(parse("squad", None, ["--protocol", protocol])) for protocol in ("paper", "released"))
    given = {"epochs": 2.0, "batch_size": 16, "lr": 3e-5, "max_length": 384, "doc_stride": 128, "levels": 10}
    assert {field: paper[field] for field in given} == given
    quirks = {"protocol": "released", "rewind_head": False, "decay": "run", "epochs": 4.0}
    assert {field: released[field] for field in paper if paper[field] != released[field]} == quirks


def test_a_flag_overrides_the_protocols_quirk():
    cfg = config("--rewind-head", protocol="released")
    assert (cfg.rewind_head, cfg.decay) == (True, "run")


def test_the_presets_tasks_are_the_tables():
    assert tuple(sorted(tasks("glue"))) == tuple(sorted(TASKS))


@pytest.mark.parametrize("protocol", ["paper", "released"])
@pytest.mark.parametrize("preset", ["glue", "squad", "mlm"])
def test_presets_set_only_fields(preset, protocol):
    assert set(preset_values(preset, protocol)) <= set(offered(preset))


# ---- the run's name ----


@settings(deadline=None, max_examples=20)
@given(st.permutations(sorted(set(GIVEN) - {"task", "mask", "rewind", "epochs"})))
def test_a_name_does_not_depend_on_the_order_of_the_flags(order):
    assert name(**{field: GIVEN[field] for field in order}) == name(**{field: GIVEN[field] for field in sorted(order)})


@pytest.mark.parametrize("field", sorted(set(GIVEN) - {"task"}))
def test_a_name_depends_on_what_bears_on_the_result_and_on_nothing_else(field):
    assert (name(**{field: GIVEN[field]}) == name()) == (field in NOT_IN_THE_NAME)


def test_a_default_that_is_written_out_changes_no_name():
    defaults = {field: value for field, value in flat(config()).items() if value is not None and field in offered("glue")}
    assert name(**defaults) == name()
    assert identity(config(**defaults), "glue") == {}


def test_the_same_said_in_other_words_changes_no_name():
    assert name(reset_optimizer=True) == name() != name(reset_optimizer=False)
    assert name(rewind="none", reset_optimizer=False) == name(rewind="none") != name(rewind="none", reset_optimizer=True)


def test_epochs_beside_steps_are_refused(capsys):
    assert "--epochs has no effect beside --max-steps" in refusal(capsys, ["--task", "rte", "--epochs", "1", "--max-steps", "10"])


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        ("", 1),
        ("--protocol released", 10),
        ("--protocol released --levels 4", 10),  # a shorter run is the beginning of the whole one
        ("--protocol released --rate 0.3", 4),
        ("--protocol released --schedule geometric --levels 5", 10),
        ("--protocol released --mask m.safetensors", 1),
    ],
)
def test_the_released_schedule_begins_a_fall_over_all_levels_in_each(words, levels):
    cfg = config(*words.split())
    for level in (0, 2):
        rate = cfg.learning_rate(level, 100)
        assert [rate(step) for step in (0, 50, 100)] == pytest.approx([cfg.train.lr * (1 - k / levels) for k in (0, 0.5, 1)])


@pytest.mark.parametrize("task", ["rte", "squad", "mlm"])
def test_released_standard_pruning_has_one_fall_over_the_run_and_one_adamw(task):
    """Three levels of 100 steps. Of masked language modelling the first is for comparison, and not part of the fall."""
    preset = task if task in ("squad", "mlm") else "glue"
    cfg = build(preset, {"task": task, "protocol": "released", "rewind": "none", "levels": 3})
    assert not cfg.resets_optimizer
    rates = [cfg.learning_rate(level, 100)(step) / cfg.train.lr for level in range(3) for step in range(100)]
    compared = [1 - k / 100 for k in range(100)] if task == "mlm" else []
    assert rates == pytest.approx([*compared, *(1 - k / (300 - len(compared)) for k in range(300 - len(compared)))])


def test_standard_pruning_by_the_paper_falls_in_each_level_unless_told_otherwise():
    assert config(rewind="none").decay == "level"
    assert config(rewind="none", decay="once").learning_rate(9, 10)(10) == 0
    assert config("--decay", "level", protocol="released", rewind="none").decay == "level"
    assert config(protocol="released", rewind="5").decay == "run"


def test_a_name_tells_task_kind_protocol_and_seed():
    assert re.fullmatch(r"rte-imp-s57-[0-9a-f]{8}", name())
    assert re.fullmatch(r"mnli-imp-released-s3-[0-9a-f]{8}", name(task="mnli", protocol="released", seed=3))
    assert re.fullmatch(r"rte-ticket-s57-[0-9a-f]{8}", name(mask="mask.pt"))
    assert len({name(task=task) for task in TASKS}) == len(TASKS)


@pytest.mark.parametrize("field", ["mask", "init"])
def test_a_file_counts_by_its_content(tmp_path, field):
    for file, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / file).write_bytes(content)
    a, b, c = (name(**{field: tmp_path / file}) for file in "abc")
    assert a == b != c


def test_a_folder_counts_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "glue").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name(data_dir="glue") == name(data_dir=tmp_path / "glue") == name(data_dir="./glue/") != name()


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["--mask", "m.pt", *flag.split()]
            for flag in ("--levels 3", "--rate 0.2", "--rewind 5", "--scope tensor", "--decay run")
        ),
        ["--mask", "m.pt", "--no-rewind-head"],
        ["--rewind", "none", "--no-rewind-head"],
    ],
    ids=" ".join,
)
def test_a_flag_that_could_do_nothing_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        parse("glue", None, ["--task", "rte", *words])
    assert end.value.code == 2
    assert re.search(r"--mask trains a given one|no meaning with --rewind none", capsys.readouterr().err)


@pytest.mark.parametrize("zero", ["0", "00", "+0", "0%", "0.0%"])
def test_all_ways_to_write_zero_are_one_run(zero):
    assert name(rewind=zero) == name()


def test_rate_alone_takes_as_many_levels_as_it_allows():
    assert config(rate=0.2).levels == 5
    assert config(rate=0.3).levels == 4
    assert config(rate=0.05).levels == 10
    assert config(rate=0.2, schedule="geometric").levels == 10


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].split()[1:] for line in README.splitlines() if line.startswith("python lt_")]
EXAMPLES = [words for _, *words in COMMANDS]


@pytest.mark.parametrize(("script", "words"), [(script, words) for script, *words in COMMANDS], ids=str)
def test_the_readmes_commands_are_accepted(script, words):
    preset = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}[script]
    assert parse(preset, None, words).task == (words[words.index("--task") + 1] if preset == "glue" else preset)


def test_the_readme_shows_every_flag():
    shown = {word.removeprefix("--").removeprefix("no-") for words in EXAMPLES for word in words if word.startswith("--")}
    assert {field.replace("_", "-") for field in FIELDS} <= shown
