"""Lines to jobs: equal lines are one job; each job knows the jobs that it needs and whether it is finished."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from quick_runs import make_levels

import oneshot
import perturb_weight
from bert_tickets.cli import parse
from bert_tickets.config import fields_of
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.masking.mask import Mask
from bert_tickets.methods import main
from bert_tickets.runs.directory import run_dir
from bert_tickets.sweep.jobs import Job, Line, plan, read_lines, split, unfinished

MAKERS = {"oneshot.py": oneshot, "perturb_weight.py": perturb_weight}
IMP = "python lt_glue.py --task mnli"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def planned(*texts: str) -> list[Job]:
    """The jobs of these lines, in the lines' order."""
    return sorted(plan(read_lines("l", "\n".join(texts)), MAKERS), key=lambda job: int(job.place.split()[-1]))


def refusal(*texts: str) -> str:
    with pytest.raises(UserError) as error:
        planned(*texts)
    return str(error.value)


def is_finished(job: Job) -> bool:
    return unfinished([job]) == []


def imp_dir(*extra: str) -> Path:
    return run_dir(parse("glue", None, ["--task", "mnli", *extra]))


def write_mask(path: Path, seed: int = 0) -> None:
    Mask({"w": torch.rand(40, generator=torch.Generator().manual_seed(seed)) > 0.5}).write(path)


def make(line: str) -> None:
    """Run a line of oneshot.py or perturb_weight.py in this process."""
    script, *words = shlex.split(line)[1:]
    MAKERS[script].main(MAKERS[script].parse(words))


# ---- lines ----


def test_blank_lines_and_comments_are_no_jobs():
    lines = read_lines("a.txt", f"# the plan\n\n  {IMP}  \n   # more\n{IMP} --seed 2")
    assert lines == [Line(IMP, "a.txt, line 3"), Line(f"{IMP} --seed 2", "a.txt, line 5")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12), min_size=1, max_size=6))
def test_quoted_words_are_split_as_they_were(words):
    assume(words[0])
    assert split(Line(shlex.join(words), "here")) == words


@given(st.lists(st.text("ab \\\"';|&<>()#$*", max_size=6), min_size=1, max_size=4))
def test_quoted_operators_are_words(words):
    assert split(Line(shlex.join(words), "here")) == words


@pytest.mark.parametrize("text", ["a | b", "a|b", "a > o", "a && b", "a; b", "a &", "(a)", "a < i", "$a", "a*", "'a'*"])
def test_a_line_that_only_a_shell_could_run_is_an_error(text):
    assert re.fullmatch(r"l, line 2: . needs a shell: quote it, or write bash -c '...'\n  .+", refusal(IMP, text))
    assert planned("bash -c " + shlex.quote(text))[0].words == ["bash", "-c", text]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python a.py 'b", "no closing quotation"),
        ("python lt_glue.py --task nli", "there is no task 'nli'; the tasks are cola"),
        ("python lt_glue.py --task rte --frobnicate", "unrecognized argument --frobnicate"),
        ("python lt_glue.py --task rte --mask m --levels 3", "--levels belongs to --method imp"),
        ("python oneshot.py --rate 2 --output m", "--rate 2.0: must be between 0 and 1"),
        ("python oneshot.py --rate 0.5 --prunable all --output m", "argument --prunable: invalid choice: 'all'"),
        ("python perturb_weight.py --output m", "one of the arguments --shuffle --noise is required"),
        ("python perturb_weight.py --shuffle layers --model . --output w", "--output w: must be outside the checkpoint"),
        ("python lt_glue.py --help", "it only asks for help"),
    ],
)
def test_a_line_that_its_script_rejects_is_an_error_with_its_place(text, said, capsys):
    found = refusal(IMP, text)
    assert found.startswith(f"l, line 2: {said}")
    assert found.endswith(text)
    assert capsys.readouterr() == ("", "")


def test_any_other_program_is_run_as_it_stands():
    jobs = planned("echo 'a b'", "python -m bert_tickets.data.demo --output x", f"{IMP} --dry-run")
    assert [(job.cfg, job.target, job.needs) for job in jobs] == [(None, None, [])] * 3
    assert unfinished(jobs) == jobs
    assert jobs[0].words == ["echo", "a b"]


# ---- equal lines ----


def test_equal_settings_are_one_job_however_they_are_written(tmp_path):
    found = planned(
        "python lt_glue.py --task mnli --batch-size 16",
        "python3 lt_glue.py --batch_size=16 --task MNLI --method imp",
        f".venv/bin/python -u {ROOT}/lt_glue.py --task mnli --batch-size 16 --lr 2e-05 --output-dir {tmp_path}/runs",
        "python lt_glue.py --task mnli --batch-size 17",
        "python oneshot.py --rate 0.5 --output masks/a",
        "python oneshot.py --output=./masks/a --rate 0.50 --method magnitude --prunable matrices",
        "python oneshot.py --rate 0.5 --output masks/b",
        "echo 'a'",
        "echo a",
    )
    assert [job.place for job in found] == [f"l, line {number}" for number in (1, 4, 5, 7, 8)]
    assert len({job.log for job in found}) == 5


def test_masks_are_equal_by_their_content(tmp_path):
    write_mask(tmp_path / "m.safetensors")
    write_mask(tmp_path / "copy")
    write_mask(tmp_path / "other", seed=1)
    (tmp_path / "link").symlink_to("m.safetensors")
    places = ("m.safetensors", "./m.safetensors", f"{tmp_path}/m.safetensors", "link", "copy", "other")
    assert len(planned(*(f"{IMP} --mask {place}" for place in places))) == 2


def test_of_equal_lines_the_one_that_keeps_models_is_run():
    (job,) = planned(IMP, f"{IMP} --keep-models", IMP)
    assert "--keep-models" in job.words


OFFERED = """--levels 4, --rate 0.05, --schedule geometric, --scope tensor, --prunable heads, --rewind 5%, --prune-first, --tf32
--no-rewind-head, --decay run, --no-reset-optimizer, --data-dir glue, --output-dir elsewhere, --protocol released, --init random
--max-length 64, --limit-train 100, --limit-eval 50, --device cpu, --keep-models, --check-metrics, --batch-size 16, --grad-accum 2
--lr 1e-4, --max-steps 7, --weight-decay 0.1, --adam-epsilon 1e-6, --max-grad-norm 2, --precision bf16, --graphs off, --seed 3
--log-every 5, --save-minutes 1, --save-steps 9"""


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(re.split(r", |\n", OFFERED)), unique=True), st.randoms(use_true_random=False))
def test_lines_merge_exactly_where_their_runs_have_one_directory(flags, random):
    random.shuffle(flags)
    line = f"python lt_glue.py {' '.join(flags)} --task mnli"
    one, two = (run_dir(parse("glue", None, shlex.split(text)[2:])).resolve() for text in (IMP, line))
    assert (len(planned(IMP, line)) == 1) == (one == two)
    names = {flag.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    assert (one == two) == ("output_dir" not in names and not any(fields_of("imp")[n].metadata["affects_result"] for n in names))


# ---- needs ----


def test_a_job_needs_the_lines_that_write_its_mask_weights_and_model():
    mlm = run_dir(parse("mlm", None, ["--keep-models"]))
    mask = imp_dir("--seed", "3") / "level_07" / "mask.safetensors"
    transfer, imp, weights, shuffled, of_mlm, mlm, ranked = planned(
        f"python lt_squad.py --mask {mask}",
        f"{IMP} --seed 3",
        "python perturb_weight.py --shuffle entries --output w/s.safetensors",
        f"python lt_glue.py --task rte --mask {mask} --init ./w/s.safetensors",
        f"python lt_glue.py --task rte --model {mlm}/level_00/model",
        "python lt_pretrain.py --keep-models",
        "python oneshot.py --rate 0.5 --init w/s.safetensors --output masks/shuffled",
    )
    assert (transfer.needs, shuffled.needs, of_mlm.needs, ranked.needs) == ([imp], [imp, weights], [mlm], [weights])
    assert (imp.needs, weights.needs, mlm.needs) == ([], [], [])


def test_files_that_are_there_and_models_on_the_hub_need_no_job(tmp_path):
    write_mask(tmp_path / "m")
    (tmp_path / "theta0").mkdir()
    on_hub, local = planned(f"{IMP} --mask m --init random --model some/theta0", f"{IMP} --mask m --model theta0")
    assert on_hub.needs == local.needs == []
    assert (set(on_hub.inputs), set(local.inputs)) == ({"mask"}, {"mask", "model"})


@pytest.mark.parametrize("flag", ["--mask nowhere/m", "--init nothing", "--model ./nothing", "--model a/b/c"])
def test_a_missing_file_that_no_line_makes_is_an_error(flag):
    assert f"l, line 2: {flag.split()[0]}" in (said := refusal(IMP, f"python lt_glue.py --task rte {flag}"))
    assert "does not exist, and no line makes it" in said


def test_the_directory_of_a_run_whose_mask_is_missing_is_not_known(tmp_path):
    """The name will be another one: it depends on the content of the mask."""
    early = run_dir(parse("glue", None, ["--task", "mnli", "--mask", f"{tmp_path}/m"])) / "level_00" / "weights.safetensors"
    lines = ["python oneshot.py --rate 0.5 --output m", f"{IMP} --mask {tmp_path}/m"]
    assert "no line makes it" in refusal(*lines, f"python lt_glue.py --task rte --init {early}")


def test_lines_that_need_each_other_are_an_error():
    lines = ["python oneshot.py --rate 0.5 --init a --output b", "python oneshot.py --rate 0.5 --init b --output a"]
    assert re.fullmatch(r"these lines need each other: l, line \d; l, line \d; l, line \d", refusal(*lines))
    assert "need each other" in refusal("python oneshot.py --rate 0.5 --init a --output a")


def test_two_lines_that_write_one_file_differently_are_an_error():
    said = refusal("python oneshot.py --rate 0.5 --output m", "python oneshot.py --rate 0.6 --output ./m")
    assert said.startswith("l, line 1 and l, line 2 both write")


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)))
def test_jobs_come_after_what_they_need_whatever_the_order_of_the_lines(order):
    chain = ["python oneshot.py --rate 0.5 --output c0"]
    chain += [f"python oneshot.py --rate 0.5 --init c{i} --output c{i + 1}" for i in range(5)]
    jobs = plan(read_lines("l", "\n".join(chain[i] for i in order)), MAKERS)
    assert [job.output.name for job in jobs] == [f"c{i}" for i in range(6)]
    assert [job.needs for job in jobs] == [[], *([job] for job in jobs[:-1])]


# ---- finished or not ----


def test_a_run_is_finished_when_all_levels_and_the_last_file_are_there():
    (job,) = planned(f"{IMP} --levels 3")
    for count in (0, 2, 3):
        assert not is_finished(job)
        make_levels(job.target, count)
    assert is_finished(job)
    (job.target / "results.jsonl").write_text("{}\n")  # as a kill in the last moment leaves it
    assert not is_finished(job)
    make_levels(job.target, 3)
    (job.target / "level_01" / "metrics.json").write_text("torn")
    assert not is_finished(job)


def test_a_real_run_and_its_transfer_are_finished(commands):
    line = shlex.join(["python", "lt_glue.py", *commands["lt_glue.py"]])
    mask = run_dir(planned(f"{line} --levels 2")[0].cfg) / "level_01" / "mask.safetensors"
    imp, transfer = planned(f"{line} --levels 2", f"{line} --mask {mask}")
    for done in (imp, transfer):
        assert done in unfinished([imp, transfer])
        main.run(done.cfg)
        assert done not in unfinished([imp, transfer])


def test_what_needs_an_unfinished_job_is_unfinished():
    mask = imp_dir("--levels", "3") / "level_01" / "mask.safetensors"
    make_levels(imp_dir("--levels", "3"), 2)
    imp, transfer = planned(f"{IMP} --levels 3", f"python lt_squad.py --mask {mask}")
    make_levels(transfer.target, 1)
    assert unfinished([imp, transfer]) == [imp, transfer]
    make_levels(imp.target, 3)
    assert unfinished([imp, transfer]) == []


ONESHOT = "python oneshot.py --rate 0.3 --method random --seed 1 --model {model} --output m"


@pytest.mark.parametrize("scope", ["", " --scope tensor", " --prunable heads"])
def test_a_mask_is_finished_if_its_file_has_the_same_settings(bert_dir, scope):
    line = ONESHOT.format(model=bert_dir) + scope
    (job,) = planned(line)
    assert not is_finished(job)
    make(line)
    assert is_finished(job)
    others = {" --scope tensor", " --prunable heads", ""} - {scope}
    others = {line.replace(scope, "") + other if scope else line + other for other in others}
    for other in (
        *others - {line},
        *(f"{line} {o}" for o in ("--rate 0.3001", "--method magnitude", "--seed 2", "--init random")),
    ):
        assert not is_finished(planned(other)[0]), other


def test_a_mask_file_names_its_method_and_the_parameters_it_covers(bert_dir, tmp_path):
    line = ONESHOT.format(model=bert_dir).replace("random", "magnitude")
    make(line)
    info = Mask.load(tmp_path / "m").info
    assert (info["method"], "prunable" in info) == ("oneshot magnitude", False)
    assert {name.split(".")[-1] for name in Mask.load(tmp_path / "m")} == {"weight"}
    make(f"{line} --prunable matrices+biases --scope tensor")
    info = Mask.load(tmp_path / "m").info
    assert (info["method"], info["prunable"]) == ("oneshot magnitude by tensor", "matrices+biases")
    assert {name.split(".")[-1] for name in Mask.load(tmp_path / "m")} == {"weight", "bias"}


def test_weights_are_finished_if_their_file_has_the_same_settings(bert_dir, tmp_path):
    lines = {how: f"python perturb_weight.py {how} --model {bert_dir} --output w" for how in ("--shuffle layers", "--noise 0.1")}
    for how, line in lines.items():
        make(line)
        assert [is_finished(planned(other)[0]) for other in lines.values()] == [how == other for other in lines]
        assert not is_finished(planned(f"{line} --seed 2")[0])
    assert read_facts(tmp_path / "w")["sigma"] == 0.1


def test_a_damaged_foreign_or_outdated_file_is_not_finished(bert_dir, tmp_path):
    make(f"python perturb_weight.py --noise 0.1 --model {bert_dir} --output w")
    line = ONESHOT.format(model=bert_dir) + " --init w"
    make(line)
    (job,) = planned(line)
    whole = (tmp_path / "m").read_bytes()
    assert is_finished(job)
    for content in (b"", whole[:-1], whole[:100], b"no such thing", whole + b"x"):
        (tmp_path / "m").write_bytes(content)
        assert not is_finished(job)
    write_mask(tmp_path / "m")  # says nothing of its settings
    assert not is_finished(job)
    (tmp_path / "m").write_bytes(whole)
    later = (tmp_path / "m").stat().st_mtime + 1
    os.utime(tmp_path / "w", (later, later))  # made again after the mask
    assert not is_finished(job)
