"""The scripts as a user runs them: a process each, in an empty folder."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
from conftest import needs_pretending

from bert_tickets.data.demo import DEV_WORDS, TRAIN_WORDS, sentences

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(bert_dir, glue_dir):
    return ["--task", "sst2", "--model", bert_dir, "--data-dir", glue_dir, "--max-steps", "4"]


def test_ticket_random_ticket_and_picture(run_script, small, bert_dir, tmp_path):
    found = run_script("lt_glue.py", *small, "--levels", "2")
    assert found.returncode == 0, found.stderr
    assert "level 1/1, 10% pruned: accuracy" in found.stdout
    table = found.stdout[found.stdout.index("level  sparsity") :].splitlines()
    assert table[0].split() == ["level", "sparsity", "accuracy", "accuracy", "-", "dense", "mask", "distance", "seconds"]
    assert table[2].split()[:2] == ["1", "10.0%"]

    made = run_script("oneshot.py", "--model", bert_dir, "--rate", "0.1", "--method", "random", "--output", "masks/r.safetensors")
    assert made.returncode == 0, made.stderr
    assert "10.0% of" in made.stdout
    ticket = run_script("lt_glue.py", *small, "--mask", "masks/r.safetensors")
    assert ticket.returncode == 0, ticket.stderr
    assert len(list(tmp_path.glob("runs/*/run.json"))) == 2

    picture = run_script("scripts/figures.py", "curves", "runs", "--output", "t.png")
    assert picture.returncode == 0, picture.stderr
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "random pruning" in picture.stdout
    values = [json.loads(f.read_text())["metrics"]["accuracy"] for f in tmp_path.glob("runs/*/level_*/metrics.json")]
    assert len(values) == 3
    assert all(f"{100 * value:.2f}" in picture.stdout for value in values)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--task", "nli"], "there is no task 'nli'; the tasks are cola, sst2"),
        (["--data-dir", "nowhere"], "no SST-2 data"),
        (["--model", "nowhere"], "no BERT checkpoint"),
        (["--mask", "nothing.safetensors"], "no mask file at nothing.safetensors"),
        (["--mask", str(ROOT / "LICENSE")], "damaged, or no mask file"),
        (["--init", "nothing"], "there is no such file"),
        (["--rate", "1.5"], "a share between 0 and 1"),
        (["--levels", "12"], "at --rate 0.1 there are 10 levels at most"),
        (["--device", "cuda:7"], "this machine has no such device"),
        (["--device", "abacus"], "give auto, cpu, cuda"),
        (["--rewind", "400"], "nothing would be trained"),
        (["--max-length", "4096"], "has positions for 128 tokens"),
        (["--output-dir", "/proc/nowhere"], "cannot write"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_a_sentence_and_exit_code_2(small, extra, words, tmp_path, monkeypatch, capsys):
    """In this process, to save a start of the interpreter each; `run_command` is what the scripts call."""
    import lt_glue
    from bert_tickets.cli import parse, run_command

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(lt_glue.main, parse("glue", None, [str(word) for word in [*small, *extra]]))
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_a_mistake_shows_no_traceback(run_script):
    found = run_script("lt_glue.py", "--task", "sst2", "--model", "nowhere")
    assert found.returncode == 2
    assert found.stderr.startswith("error: no BERT checkpoint")
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("source", ["data", "drawn"])
def test_bench_measures_both_loops_on_the_same_examples(monkeypatch, bert_dir, glue_dir, tmp_path, capsys, source):
    words = f"bench.py --model {bert_dir} --batch-size 4 --max-length 48 --turns 1 --turn-steps 2 --json {tmp_path}/b.json"
    words += f" --tasks sst2 rte --data-dir {glue_dir}" if source == "data" else " --tasks sst2 rte mlm"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(bench, "measure_alone", lambda *_: {"peak memory, MiB": 1.0})
    bench.main(bench.parse())
    assert "released over ours, times" in capsys.readouterr().out
    for task in json.loads((tmp_path / "b.json").read_text())["tasks"].values():
        assert 4 * 3 <= task["real tokens a step"] <= task["padded tokens a step"] == 4 * 48
        assert task["released over ours, times"] == pytest.approx(task["ours: steps/s"] / task["released: steps/s"])
        assert task["ours: % of the machine's rate"] > 0


@pytest.mark.cuda
def test_bench_on_a_gpu_measures_eager_steps_graphs_and_the_released_loop(monkeypatch, bert_dir, tmp_path):
    words = f"bench.py --model {bert_dir} --tasks mnli --batch-size 4 --max-length 48 --turns 1 --turn-steps 2"
    words += f" --json {tmp_path}/b.json"
    monkeypatch.setattr("sys.argv", words.split())
    bench.main(bench.parse())
    found = json.loads((tmp_path / "b.json").read_text())["tasks"]["mnli"]
    for side in ("eager", "graphs", "released"):
        for figure in ("steps/s", "kernels a step", "GPU busy, %", "peak memory, MiB"):
            assert found[f"{side}: {figure}"] > 0
    monkeypatch.setattr("sys.argv", [*words.split(), "--profile"])
    bench.main(bench.parse())
    assert any("FusedOptimizer" in kernel for kernel in json.loads((tmp_path / "b.json").read_text())["tasks"]["mnli"])


def test_bench_measures_what_a_level_costs(monkeypatch, bert_dir, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", f"bench.py --level --model {bert_dir} --json {tmp_path}/b.json".split())
    bench.main(bench.parse())
    assert "choose the mask, s" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text())["level"]["mask file, MB"] > 0


@needs_pretending
def test_bench_counts_the_kernels_of_a_step_without_a_gpu(monkeypatch, tmp_path, capsys):
    """Of BERT-base in fp16 on 32 examples of MNLI's lengths."""
    monkeypatch.setattr("sys.argv", f"bench.py --count --tasks mnli --json {tmp_path}/c.json".split())
    bench.main(bench.parse())
    found = json.loads((tmp_path / "c.json").read_text())["tasks"]["mnli"]
    assert found["together, kernels"] == sum(n for kind, n in found.items() if kind.endswith("kernels")) / 2
    assert found["attention, kernels"] == 2 * 12 + 2  # and the loss's softmax
    assert found["matrix products, kernels"] == 12 * 4 * 3 + 6  # query, key and value are one; the pooler's and the head's
    assert found["casts, kernels"] < 100  # one of the hidden state for query, key and value, one of all weights
    assert 550 < found["together, kernels"] < 620
    assert 10 < found["together, GB"] < 11
    assert "together, kernels" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--turns 0", "--turn-steps -1", "--sparsity nan", "--batch-size 0", f"--max-length {10**20}"])
def test_bench_refuses_numbers_that_measure_nothing(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["bench.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        bench.parse()
    assert stop.value.code == 2
    assert f"error: {words}: " in capsys.readouterr().err


def test_the_released_loop_of_bench_learns_what_ours_learns(monkeypatch, calm_bert_dir, glue_dir):
    """Same network, same examples, no dropout, one batch that holds them all: the same step, but for rounding."""
    import copy

    import torch

    from bert_tickets.bench import baselines as loops

    given = {"model": str(calm_bert_dir), "data_dir": str(glue_dir), "batch_size": 44, "max_length": 48}
    case = loops.prepare("sst2", given | {"lr": 1e-3, "limit_train": 44}, sparsity=0.5)
    nets = []
    kept = SimpleNamespace(deepcopy=lambda net: nets.append(copy.deepcopy(net)) or nets[-1])
    monkeypatch.setattr(loops, "copy", kept)
    both = loops.ours(case), loops.released(case)
    for i in range(3):
        for loop in both:
            loop(i)
    net, other = nets
    theirs = {name.removesuffix("_orig"): p for name, p in other.named_parameters()}
    for name, p in net.named_parameters():
        expected = theirs[name] * case.mask[name] if name in case.mask else theirs[name]
        torch.testing.assert_close(p, expected, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_bench_takes_each_lever_away(monkeypatch, bert_dir, calm_bert_dir, glue_dir, tmp_path, capsys, precision):
    """Every loop runs; and each lever that does not change the arithmetic leaves the training as it is."""
    from bert_tickets.bench import baselines as loops

    words = (
        f"bench.py --tasks rte --model {bert_dir} --data-dir {glue_dir} --batch-size 4 --max-length 48 --turns 1 --turn-steps 1"
        f" --precision {precision}"
    )
    monkeypatch.setattr(bench, "measure_alone", lambda *_, **more: {"a step, ms": 2.0 if more else 1.0})
    for option in ("--levers", "--profile"):
        monkeypatch.setattr("sys.argv", [*words.split(), option])
        bench.main(bench.parse())
    shown = capsys.readouterr().out
    assert all(f"{lever}, %" in shown for lever in loops.LEVERS)
    assert "freed memory kept, %        100" in shown
    assert "aten::addmm" in shown

    given = {"model": str(calm_bert_dir), "data_dir": str(glue_dir), "batch_size": 4, "max_length": 48, "limit_train": 40}
    case = loops.prepare("rte", given | {"lr": 1e-3, "precision": precision}, sparsity=0.5)
    curves = {}
    for name, build in {"ours": loops.ours, **loops.LEVERS}.items():
        loop = build(case)
        curves[name] = [float(loop(i)) for i in range(4)]
    expected = curves.pop("ours")
    rounding = 1e-5 if precision == "fp32" else 1e-2
    assert curves.pop("packing") != pytest.approx(expected, abs=1e-5)  # its padding is counted as tokens, to cost what they cost
    for name, curve in curves.items():
        assert curve == pytest.approx(expected, abs=rounding), name


def test_the_demos_task_cannot_be_solved_by_the_words_it_trains_on():
    train, dev = list(sentences(1280, TRAIN_WORDS, 0)), list(sentences(400, DEV_WORDS, 1))
    assert len({text for text, _ in train}) == 1280
    assert sum(label for _, label in train) == 640
    assert sum(label for _, label in dev) == 200
    opinions = [set(" ".join(words).split()) for words in (TRAIN_WORDS, DEV_WORDS)]
    assert not opinions[0] & opinions[1]
    assert not opinions[1] & {word for text, _ in train for word in text.split()}
    negations = ("not", "never", "nobody", "but", "nothing", "cannot")
    negated = [any(word in negations for word in text.split()) for text, _ in dev]
    assert sum(negated) / len(negated) == pytest.approx(1 / 3, abs=0.01)
    assert list(sentences(50, DEV_WORDS, 1)) == dev[:50]


def test_the_shell_scripts_say_what_they_miss(tmp_path):
    """A Python that is too old, and one without venv, each in words; nothing half-made is left behind."""
    clone = tmp_path / "clone"
    (clone / "scripts").mkdir(parents=True)
    for name in ("environment.sh", "test.sh"):
        (clone / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    old, bare = tmp_path / "old", tmp_path / "bare"
    old.write_text("#!/bin/sh\nexit 1\n")
    bare.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p .venv/bin\nexit 1\n')
    for script in (old, bare):
        script.chmod(0o755)

    def call(python: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(clone / "scripts" / "test.sh")],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert "Python 3.11 or newer is needed" in (found := call(old)).stderr
    assert found.returncode == 1
    assert "python3-venv" in (found := call(bare)).stderr
    assert found.returncode == 1
    assert not (clone / ".venv").exists()


def test_help_answers_without_torch(run_script):
    import time

    began = time.monotonic()
    found = run_script("lt_glue.py", "--help")
    assert found.returncode == 0
    assert "--task TASK" in found.stdout
    assert time.monotonic() - began < 2  # a start with torch takes three
