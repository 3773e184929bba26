"""Lines to jobs: equal ones are one, each knows what it needs, and whether it is done."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_cli import GIVEN, words

import lt_glue
import oneshot
import perturb_weight
from bert_tickets.cli import parse
from bert_tickets.config import FIELDS, run_name
from bert_tickets.errors import UserError
from bert_tickets.files import write_checksummed
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import run_dir
from bert_tickets.sweep import jobs
from bert_tickets.sweep.jobs import Line, is_done, plan, progress, read_lines, split, target

MAKERS = {"oneshot.py": oneshot, "perturb_weight.py": perturb_weight}
IMP = "python lt_glue.py --task mnli"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def planned(*texts: str) -> list[jobs.Job]:
    return plan(read_lines("lines.txt", "\n".join(texts)), MAKERS)


def refused(*texts: str) -> str:
    with pytest.raises(UserError) as error:
        planned(*texts)
    return str(error.value)


def imp_dir(*extra: str, preset: str = "glue") -> Path:
    return run_dir(parse(preset, None, ["--task", "mnli", *extra] if preset == "glue" else list(extra)), preset)


def write_mask(path: Path, seed: int = 0, **info: str) -> None:
    Mask({"w": torch.rand(40, generator=torch.Generator().manual_seed(seed)) > 0.5}).write(path, **info)


# ---- lines ----


def test_blank_lines_and_comments_are_no_jobs():
    lines = read_lines("a.txt", f"# the plan\n\n  {IMP}  \n   # more\n{IMP} --seed 2")
    assert lines == [Line(IMP, "a.txt, line 3"), Line(f"{IMP} --seed 2", "a.txt, line 5")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12), min_size=1, max_size=6))
def test_whatever_is_quoted_comes_back(given_words):
    assume(given_words[0])
    assert split(Line(shlex.join(given_words), "here")) == given_words


@given(st.lists(st.text("ab \\\"';|&<>()#$*", max_size=6), min_size=1, max_size=4))
def test_quoted_operators_are_words(given_words):
    assert split(Line(shlex.join(given_words), "here")) == given_words


@pytest.mark.parametrize("text", ["a | b", "a|b", "a > o", "a && b", "a; b", "a &", "(a)", "a < i", "$a", "a*", "'a'*"])
def test_what_only_a_shell_could_do_is_refused(text):
    assert re.fullmatch(r"lines.txt, line 2: . is for a shell: quote it, or give bash -c '...'\n  .+", refused(IMP, text))
    (job,) = planned("bash -c " + shlex.quote(text))
    assert job.words == ["bash", "-c", text]


def test_an_open_quote_is_named_with_its_line():
    assert refused(IMP, "python a.py 'b") == "lines.txt, line 2: no closing quotation\n  python a.py 'b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python lt_glue.py --task nli", "there is no task 'nli'; the tasks are cola"),
        ("python lt_glue.py --task rte --frobnicate", "unrecognized arguments: --frobnicate"),
        ("python lt_glue.py --task rte --levels 12", "--levels 12: the last would remove 110%"),
        ("python lt_squad.py --task rte", "unrecognized arguments: --task rte"),
        ("python oneshot.py --rate 2 --output m", "--rate 2.0: a share between 0 and 1 is needed"),
        ("python perturb_weight.py --output m", "one of the arguments --shuffle --noise is required"),
        ("python lt_glue.py --help", "it asks for help only"),
    ],
)
def test_a_line_that_its_script_refuses_is_named(text, said, capsys):
    found = refused(IMP, text)
    assert found.startswith(f"lines.txt, line 2: {said}")
    assert found.endswith(text)
    assert capsys.readouterr() == ("", "")


def test_any_other_program_is_run_as_it_stands():
    one, two, dry = planned("echo 'a b'", "python -m bert_tickets.data.demo --output x", f"{IMP} --dry-run")
    assert (one.words, one.needs, target(one), is_done(one, None)) == (["echo", "a b"], [], None, False)
    assert progress(one, None) is None
    assert two.cfg is None
    assert dry.cfg is None  # it would only print its plan, and never be done


# ---- equal lines ----


def test_equal_configurations_are_one_job_however_they_are_written(tmp_path):
    found = planned(
        "python lt_glue.py --task mnli --batch-size 16",
        "python3 lt_glue.py --batch_size=16 --task MNLI",
        f".venv/bin/python -u {ROOT}/lt_glue.py --task mnli --batch-size 16 --lr 2e-05 --output-dir {tmp_path}/runs",
        "python lt_glue.py --task mnli --batch-size 16 --device cpu --save-minutes 1",
        "python lt_glue.py --task mnli --batch-size 17",
        "python lt_glue.py --task mnli --batch-size 16 --output-dir elsewhere",
    )
    assert [job.place for job in found] == ["lines.txt, line 1", "lines.txt, line 5", "lines.txt, line 6"]
    assert len({job.name for job in found}) == 3  # a log file each


def test_masks_and_weights_are_the_same_by_their_place(tmp_path):
    write_mask(tmp_path / "m.safetensors")
    (tmp_path / "link").symlink_to("m.safetensors")
    at = [f"{IMP} --mask {place}" for place in ("m.safetensors", "./m.safetensors", f"{tmp_path}/m.safetensors", "link")]
    assert len(planned(*at)) == 1


def test_makers_and_other_programs_merge_too():
    found = planned(
        "python oneshot.py --rate 0.5 --output masks/a",
        "python oneshot.py --output=./masks/a --rate 0.50 --method magnitude",
        "python oneshot.py --rate 0.5 --output masks/b",
        "echo 'a'",
        "echo a",
        "echo b",
    )
    assert [job.place[-1] for job in found] == ["1", "3", "4", "6"]


def test_of_equal_lines_the_one_that_keeps_more_is_run():
    (job,) = planned(IMP, f"{IMP} --keep-models", IMP)
    assert "--keep-models" in job.words
    assert job.cfg.keep_models


OFFERED = sorted(set(GIVEN) - {"task", "mask", "init", "model", "dry_run", "epochs"})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(OFFERED), unique=True), st.randoms(use_true_random=False))
def test_lines_merge_exactly_where_their_runs_have_one_directory(fields, random):
    given_flags = [words(name, GIVEN[name]) for name in fields]
    random.shuffle(given_flags)
    line = shlex.join(["python", "lt_glue.py", *(word for flag in given_flags for word in flag), "--task", "mnli"])
    found = planned(IMP, line)
    one, two = (parse("glue", None, shlex.split(text)[2:]) for text in (IMP, line))
    assert (len(found) == 1) == (run_dir(one, "glue").resolve() == run_dir(two, "glue").resolve())
    assert (len(found) == 1) == (all(not FIELDS[name].metadata["identity"] for name in fields) and "output_dir" not in fields)


# ---- who waits for whom ----


def test_transfers_wait_for_the_ticket_and_for_the_weights():
    mask = imp_dir("--seed", "3") / "level_07" / "mask.safetensors"
    transfer, imp, weights, shuffled, of_mlm, mlm = planned(
        f"python lt_squad.py --mask {mask}",
        f"{IMP} --seed 3",
        "python perturb_weight.py --shuffle entries --output w/s.safetensors",
        f"python lt_glue.py --task rte --mask {mask} --init ./w/s.safetensors",
        f"python lt_glue.py --task rte --model {imp_dir('--keep-models', preset='mlm')}/level_00/model",
        "python lt_pretrain.py --keep-models",
    )
    assert (transfer.needs, shuffled.needs, of_mlm.needs) == ([imp], [imp, weights], [mlm])
    assert (imp.needs, weights.needs, mlm.needs) == ([], [], [])


def test_a_mask_of_perturbed_weights_waits_as_well():
    made, ranked = planned(
        "python perturb_weight.py --noise 0.1 --output w", "python oneshot.py --rate 0.5 --init w --output masks/noise"
    )
    assert ranked.needs == [made]


def test_what_is_there_or_on_the_hub_needs_nobody(tmp_path):
    write_mask(tmp_path / "m")
    (tmp_path / "theta0").mkdir()
    (job,) = planned(f"{IMP} --mask m --init random --model some/theta0")
    (local,) = planned(f"{IMP} --mask m --model theta0")
    assert (job.needs, local.needs) == ([], [])
    assert set(job.inputs) == {"mask"}
    assert set(local.inputs) == {"mask", "model"}


@pytest.mark.parametrize("flag", ["--mask nowhere/m.safetensors", "--init nothing", "--model ./nothing", "--model a/b/c"])
def test_what_is_not_there_and_nobody_makes_is_refused(flag):
    assert f"lines.txt, line 2: {flag.split()[0]}" in (said := refused(IMP, f"python lt_glue.py --task rte {flag}"))
    assert "is not there, and no line makes it" in said


def test_a_level_that_its_run_does_not_have_is_refused():
    source = imp_dir("--levels", "5")
    assert planned(f"{IMP} --levels 5", f"{IMP} --mask {source}/level_04/mask.safetensors")[1].needs
    said = refused(f"{IMP} --levels 5", f"{IMP} --mask {source}/level_07/mask.safetensors")
    assert said == "lines.txt, line 2: --mask is of level 7, and lines.txt, line 1 has levels 0 to 4"


def test_a_circle_is_refused():
    two = ["python oneshot.py --rate 0.5 --init a --output b", "python oneshot.py --rate 0.5 --init b --output a"]
    said = refused(*two)
    assert "wait for each other in a circle" in said
    assert "line 1" in said
    assert "line 2" in said
    assert "circle" in refused("python oneshot.py --rate 0.5 --init a --output a")


def test_two_that_write_one_file_differently_are_refused():
    said = refused("python oneshot.py --rate 0.5 --output m", "python oneshot.py --rate 0.6 --output ./m")
    assert said.startswith("lines.txt, line 1 and lines.txt, line 2 both write")


def test_a_run_of_a_mask_that_is_not_there_yet_has_no_name_to_wait_for():
    """Its name will be another one: it holds the mask's content."""
    maker = "python oneshot.py --rate 0.5 --output m"
    cfg = parse("glue", None, ["--task", "mnli", "--mask", "m"])
    early = run_dir(cfg, "glue") / "level_00" / "weights.safetensors"
    assert "no line makes it" in refused(maker, f"{IMP} --mask m", f"python lt_glue.py --task rte --init {early}")


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)))
def test_needs_do_not_depend_on_the_order_of_the_lines(order):
    chain = ["python oneshot.py --rate 0.5 --output c0"]
    chain += [f"python oneshot.py --rate 0.5 --init c{i} --output c{i + 1}" for i in range(5)]
    found = {job.output.name: job for job in planned(*(chain[i] for i in order))}
    assert [job.output.name for job in planned(*(chain[i] for i in order))] == [f"c{i}" for i in order]
    assert all(found[f"c{i + 1}"].needs == [found[f"c{i}"]] for i in range(5))


# ---- done or not ----


def make_levels(run: Path, levels: int, lines: int | None = None) -> None:
    for level in range(levels):
        write_checksummed(run / f"level_{level:02d}" / "metrics.json", {})
    (run / f"level_{levels - 1:02d}" / "weights.safetensors").touch()
    (run / "results.jsonl").write_text("{}\n" * (levels if lines is None else lines))


def test_a_run_is_done_when_all_its_levels_are_there():
    (job,) = planned(f"{IMP} --levels 3")
    run = target(job)
    assert run == (Path("runs") / run_name(job.cfg, "glue")).resolve()
    assert (is_done(job, run), progress(job, run)) == (False, (0, 3))
    make_levels(run, 2)
    assert (is_done(job, run), progress(job, run)) == (False, (2, 3))
    write_checksummed(run / "level_02" / "metrics.json", {})
    (run / "results.jsonl").write_text("{}\n" * 3)
    assert (is_done(job, run), progress(job, run)) == (True, (3, 3))


def test_what_a_kill_in_the_last_moment_left_is_not_done():
    """All levels are there, and the run would still tidy up."""
    (job,) = planned(f"{IMP} --levels 3")
    run = target(job)
    make_levels(run, 3, lines=2)
    assert not is_done(job, run)
    (run / "results.jsonl").write_text("{}\n" * 3)
    assert is_done(job, run)
    (run / "level_01" / "metrics.json").write_text("torn")  # the run itself will say so
    assert not is_done(job, run)


def test_done_is_what_the_script_itself_calls_done(commands):
    """A real run, and a real ticket trained, by the directory they leave."""
    line = shlex.join(["python", "lt_glue.py", *commands["lt_glue.py"]])
    (job,) = planned(f"{line} --levels 2")
    lt_glue.main(job.cfg)
    assert is_done(job, target(job))
    (ticket,) = planned(f"{line} --mask {target(job)}/level_01/mask.safetensors")
    assert not is_done(ticket, target(ticket))
    lt_glue.main(ticket.cfg)
    assert is_done(ticket, target(ticket))
    assert progress(ticket, target(ticket)) == (1, 1)


def test_a_runs_name_follows_the_masks_content():
    (maker, job) = planned("python oneshot.py --rate 0.5 --output m", f"{IMP} --mask m")
    names = [target(job)]
    for seed in (0, 1, 0):
        write_mask(maker.output, seed)
        names.append(target(job))
    assert len(set(names)) == 3
    assert names[1] == names[3]


def made(script, line: str) -> None:
    script.main(script.parse(shlex.split(line)[2:]))


ONESHOT = "python oneshot.py --rate 0.3 --method random --seed 1 --model {model} --output m"


def test_a_mask_of_global_scope_says_nothing_of_it():
    """So that the masks of earlier versions count as made."""
    facts = oneshot.facts(oneshot.parse(["--rate", "0.5", "--output", "m"]))
    assert facts == {"base_model": "bert-base-uncased", "method": "oneshot magnitude", "init": "pretrained", "seed": "57"}


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_mask_is_done_if_its_file_says_the_same_settings(bert_dir, tmp_path, monkeypatch, scope):
    words = ONESHOT if scope == "global" else ONESHOT.replace("--rate", "--scope tensor --rate")
    line = words.format(model=bert_dir)
    (job,) = planned(line)
    assert not is_done(job, target(job))
    made(oneshot, line)
    assert is_done(job, target(job))
    also = "--scope tensor" if scope == "global" else "--scope global"
    for other in (also, "--rate 0.31", "--rate 0.3001", "--method magnitude", "--seed 2", "--init random", "--model another"):
        (differs,) = planned(f"{line} {other}")
        assert not is_done(differs, target(differs)), other
    monkeypatch.chdir(bert_dir.parent)
    (relative,) = planned(f"{words.format(model='./bert0')[:-1]}{tmp_path}/m".replace("bert0", bert_dir.name))
    assert is_done(relative, target(relative))


@pytest.mark.parametrize("how", ["--shuffle layers", "--shuffle matrices", "--shuffle entries", "--noise 0.1"])
def test_weights_are_done_if_their_file_says_the_same_settings(how, bert_dir):
    line = "python perturb_weight.py {how} --seed 1 --model {model} --output w"
    made(perturb_weight, line.format(how=how, model=bert_dir))
    for asked in ("--shuffle layers", "--shuffle matrices", "--shuffle entries", "--noise 0.1", "--noise 0.2"):
        (job,) = planned(line.format(how=asked, model=bert_dir))
        assert is_done(job, target(job)) == (asked == how), asked
        (other,) = planned(line.format(how=asked, model=bert_dir) + " --seed 2")
        assert not is_done(other, target(other))


def test_a_damaged_or_foreign_file_is_not_done(bert_dir, tmp_path):
    line = ONESHOT.format(model=bert_dir)
    (job,) = planned(line)
    made(oneshot, line)
    whole = (tmp_path / "m").read_bytes()
    for content in (b"", whole[:-1], whole[:100], b"no such thing", whole + b"x"):
        (tmp_path / "m").write_bytes(content)
        assert not is_done(job, target(job))
    write_mask(tmp_path / "m")  # a mask that says nothing of its making
    assert not is_done(job, target(job))
    (tmp_path / "m").unlink()
    (tmp_path / "m").mkdir()
    assert not is_done(job, target(job))


def test_what_is_older_than_what_it_was_made_from_is_not_done(bert_dir, tmp_path):
    made(perturb_weight, f"python perturb_weight.py --noise 0.1 --model {bert_dir} --output w")
    line = ONESHOT.format(model=bert_dir) + " --init w"
    (job,) = planned(line)
    made(oneshot, line)
    assert is_done(job, target(job))
    later = (tmp_path / "m").stat().st_mtime + 1
    os.utime(tmp_path / "w", (later, later))
    assert not is_done(job, target(job))


def test_the_readmes_lines_are_planned():
    """Every example of a run that reads no file is a job, and each its own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.partition(" #")[0].strip() for line in text.splitlines() if line.startswith(("python lt_", "python oneshot"))]
    reads = ("--mask", "--init weights", "DIR", "runs/", "--dry-run")
    lines = [line for line in lines if not any(word in line for word in reads)]
    found = planned(*lines)
    assert len(found) >= 20
    assert all(job.cfg or job.output for job in found)
