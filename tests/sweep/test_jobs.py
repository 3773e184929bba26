"""Lines to jobs: equal lines are one job; each job knows the jobs that it needs and whether it is finished."""

import re
import shlex
import shutil
from pathlib import Path

import derive
import pytest
import torch
from conftest import ROOT

import oneshot
import perturb_weight
from bert_tickets.cli import parse
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.methods import main
from bert_tickets.runs.directory import run_dir
from bert_tickets.sweep.jobs import Job, plan, read_lines, unfinished

MAKERS = {"derive.py": derive, "oneshot.py": oneshot, "perturb_weight.py": perturb_weight}
IMP = "python lt_glue.py --task mnli"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def planned(*texts: str) -> list[Job]:
    """The jobs of these lines, in the lines' order."""
    jobs = plan({f"line {number}": text for number, text in enumerate(texts, 1)}, MAKERS)
    return sorted(jobs, key=lambda job: int(job.place.split()[-1]))


def refusal(*texts: str) -> str:
    with pytest.raises(UserError) as error:
        planned(*texts)
    return str(error.value)


def is_finished(*texts: str) -> list[bool]:
    """Whether the job of each line is finished, alone."""
    return [unfinished(planned(text)) == [] for text in texts]


def imp_dir(*extra: str) -> Path:
    return run_dir(parse("glue", None, ["--task", "mnli", *extra]))


def write_mask(path: Path, seed: int = 0) -> None:
    Mask({"w": torch.rand(40, generator=torch.Generator().manual_seed(seed)) > 0.5}).write(path)


def make(line: str) -> None:
    """Run a line of a script that makes a file in this process."""
    script, *words = shlex.split(line)[1:]
    maker = MAKERS[Path(script).name]
    maker.main(maker.parse(words))


# ---- lines ----


def test_blank_lines_and_comments_are_no_jobs(tmp_path):
    (tmp_path / "a.txt").write_text(f"# the plan\n\n  {IMP}  \n   # more\n{IMP} --seed 2")
    (tmp_path / "b.txt").write_text("echo b")
    lines = read_lines(["a.txt", "b.txt"])
    assert lines == {"a.txt, line 3": IMP, "a.txt, line 5": f"{IMP} --seed 2", "b.txt, line 1": "echo b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python a.py 'b", "no closing quotation"),
        ("python lt_glue.py --task nli", "there is no task 'nli'; the tasks are cola"),
        ("python lt_glue.py --task rte > log", "unrecognized argument >"),
        ("python oneshot.py --rate 2 --output m", "--rate 2.0: must be between 0 and 1"),
        ("python lt_glue.py --help", "it only asks for help"),
        ("python lt_glue.py --task rte --mask nowhere/m", "--mask {here}/nowhere/m does not exist, and no line makes it"),
        ("python lt_glue.py --task rte --model a/b/c", "--model {here}/a/b/c does not exist"),
        ("cd a && python lt_glue.py --task rte", "a line that changes the folder cannot be planned"),
    ],
)
def test_a_line_that_cannot_run_is_an_error_with_its_place(text, said, capsys, tmp_path):
    found = refusal(IMP, text)
    assert found.startswith(f"line 2: {said.format(here=tmp_path)}")
    assert found.endswith(text)
    assert capsys.readouterr() == ("", "")


def test_any_other_command_is_run_as_it_stands():
    lines = ["echo 'a b' | wc", "python -m bert_tickets.data.demo --output x", f"{IMP} --dry-run"]
    jobs = planned(*lines)
    assert [(job.text, job.target, job.needs) for job in jobs] == [(line, None, set()) for line in lines]
    assert unfinished(jobs) == jobs


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
        "echo a",
        "echo a",
    )
    assert [job.place for job in found] == [f"line {number}" for number in (1, 4, 5, 7, 8)]
    assert len({job.log for job in found}) == 5


def test_of_equal_lines_the_one_that_keeps_models_is_run():
    (job,) = planned(IMP, f"{IMP} --keep-models", IMP)
    assert "--keep-models" in job.text


def test_lines_that_contradict_or_need_each_other_are_an_error():
    said = refusal("python oneshot.py --rate 0.5 --output m", "python oneshot.py --rate 0.6 --output ./m")
    assert said.startswith("line 1 and line 2 both write")
    said = refusal("python oneshot.py --rate 0.5 --init a --output b", "python oneshot.py --rate 0.5 --init b --output a")
    assert re.fullmatch(r"these lines need each other: line \d; line \d; line \d", said)


# ---- needs ----


def test_a_job_comes_after_those_that_write_its_mask_weights_and_model():
    mlm = run_dir(parse("mlm", None, ["--keep-models"]))
    mask = imp_dir("--seed", "3") / "level_07" / "mask.safetensors"
    lines = (
        f"python lt_squad.py --mask {mask}",
        f"{IMP} --seed 3",
        "python lt_glue.py --task rte --init masked --model theta",
        f"python lt_glue.py --task rte --mask {mask} --init ./w/s.safetensors",
        f"python lt_glue.py --task rte --model {mlm}/level_00/model",
        "torchrun --nproc-per-node 2 lt_pretrain.py --keep-models",
        "python oneshot.py --rate 0.5 --init w/s.safetensors --output masked",
        "python perturb_weight.py --shuffle entries --output w/s.safetensors",
    )
    transfer, imp, last, shuffled, of_mlm, mlm, ranked, weights = planned(*lines)
    assert (transfer.needs, shuffled.needs, of_mlm.needs, ranked.needs) == ({imp}, {imp, weights}, {mlm}, {weights})
    assert (imp.needs, weights.needs, mlm.needs, last.needs) == (set(), set(), set(), {ranked})
    order = plan(dict(enumerate(lines)), MAKERS)
    assert all(order.index(need) < order.index(job) for job in order for need in job.needs)


def test_files_that_are_there_and_models_on_the_hub_need_no_job(tmp_path):
    write_mask(tmp_path / "m")
    (tmp_path / "theta0").mkdir()
    on_hub, local = planned(f"{IMP} --mask m --init random --model some/theta0", f"{IMP} --mask m --model theta0")
    assert on_hub.needs == local.needs == set()
    assert (set(on_hub.inputs), set(local.inputs)) == ({"mask"}, {"mask", "model"})


def test_the_directory_of_a_run_whose_mask_is_missing_is_not_known(tmp_path):
    """The name will be another one: it depends on the content of the mask."""
    early = run_dir(parse("glue", None, ["--task", "mnli", "--mask", f"{tmp_path}/m"])) / "level_00" / "weights.safetensors"
    lines = ["python oneshot.py --rate 0.5 --output m", f"{IMP} --mask {tmp_path}/m"]
    assert "no line makes it" in refusal(*lines, f"python lt_glue.py --task rte --init {early}")


# ---- finished or not ----


def test_a_run_is_finished_when_all_its_files_are_there_and_what_it_needs_is_finished(commands):
    line = shlex.join(["python", "lt_glue.py", *commands["lt_glue.py"]])
    mask = run_dir(planned(f"{line} --levels 2")[0].cfg) / "level_01" / "mask.safetensors"
    jobs = imp, transfer = planned(f"{line} --levels 2", f"{line} --mask {mask}")
    assert unfinished(jobs) == [imp, transfer]
    main.run(imp.cfg)
    assert unfinished(jobs) == [transfer]
    main.run(transfer.cfg)
    assert unfinished(jobs) == []
    for name in ("results.jsonl", "level_01/metrics.json"):
        whole = (imp.target / name).read_bytes()
        (imp.target / name).write_bytes(whole[:-9])  # as a kill in the last moment leaves it
        assert unfinished(jobs) == [imp, transfer]
        (imp.target / name).write_bytes(whole)
    assert unfinished(jobs) == []


OTHERS = ["--rate 0.3001", "--method magnitude", "--seed 2", "--init random", "--scope tensor", "--prunable heads"]


@pytest.mark.parametrize(
    ("line", "others"),
    [
        ("python oneshot.py --rate 0.3 --method random --seed 1 --output m", OTHERS),
        ("python oneshot.py --rate 0.3 --prunable heads --output m", ["--prunable matrices"]),
        ("python perturb_weight.py --noise 0.1 --output w", ["--noise 0.2", "--seed 2"]),
    ],
)
def test_a_file_is_finished_if_it_has_the_same_settings(bert_dir, line, others):
    line += f" --model {bert_dir}"
    assert is_finished(line) == [False]
    make(line)
    assert is_finished(line, *(f"{line} {other}" for other in others)) == [True, *[False] * len(others)]


def test_a_damaged_foreign_or_outdated_file_is_not_finished(bert_dir, tmp_path):
    make(f"python perturb_weight.py --noise 0.1 --model {bert_dir} --output w")
    line = f"python oneshot.py --rate 0.3 --model {bert_dir} --init w --output m"
    make(line)
    whole = (tmp_path / "m").read_bytes()
    assert is_finished(line) == [True]
    for content in (b"", whole[:-1], b"no such thing"):
        (tmp_path / "m").write_bytes(content)
        assert is_finished(line) == [False]
    write_mask(tmp_path / "m")  # says nothing of its settings
    assert is_finished(line) == [False]
    (tmp_path / "m").write_bytes(whole)
    assert is_finished(line.replace(str(bert_dir), str(shutil.copytree(bert_dir, tmp_path / "copy")))) == [True]
    make(f"python perturb_weight.py --noise 0.2 --model {bert_dir} --output w")  # the mask is of other weights
    assert is_finished(line) == [False]


def test_a_derived_ticket_needs_its_tickets_and_is_done_if_they_are_the_same(tmp_path):
    line = "python scripts/derive.py super one two --output super"
    for seed, name in enumerate(("one", "two")):
        write_mask(tmp_path / name, seed)
    assert is_finished(line) == [False]
    make(line)
    assert is_finished(line, line.replace("super one", "union one")) == [True, False]
    write_mask(tmp_path / "two", 2)
    assert is_finished(line) == [False]
    (tmp_path / "two").unlink()
    assert "MASK 2" in refusal(line)
    drawn = "python scripts/derive.py random one --output drawn"
    for other in (" --seed 3", " --random-size binomial"):
        make(drawn + other)
        assert is_finished(drawn) == [False]
    make(drawn)
    assert is_finished(drawn, f"{drawn} --seed 57") == [True, True]
    mask = imp_dir("--seed", "1") / "level_01" / "mask.safetensors"
    random = f"python scripts/derive.py random {mask} --seed 1 --output random"
    found = planned(f"{IMP} --seed 1", random, f"{IMP} --mask random", f"{IMP} --score --mask random --weights {mask}")
    assert [len(job.needs) for job in found] == [0, 1, 1, 2]
