"""The check of a GPU box: whole on a CPU, its checks of steps on a pretended GPU, and what it does about a failure."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from captures import step_again
from conftest import ROOT, needs_pretending

from bert_tickets.bench import checks, step_checks
from bert_tickets.bench import fake_cuda as pretended
from bert_tickets.bench import tiny_bert as generated
from bert_tickets.modeling.loading import load_bert
from bert_tickets.tasks.glue import Glue
from bert_tickets.training.cuda_graphs import Recorder


def test_on_a_cpu_it_passes_what_needs_no_gpu(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--quick", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "log.txt").read_text()
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    results = {line["check"]: line["result"] for line in found["checks"]}
    assert list(results) == list(gpu_check.CHECKS)
    assert {name for name, result in results.items() if result == "pass"} == {"run", "steps", "speed", "tasks"}
    assert set(results.values()) == {"pass", "no GPU"}
    assert found["checks"][0]["seconds"] > 0
    assert f"run        pass      {found['checks'][0]['seconds']:6.1f} s  9 files equal" in done.stdout


@pytest.fixture
def setting(bert_dir, tmp_path):
    """A setting whose network is the tests' own, and whose numbers are a CPU's."""

    class Small(checks.Setting):
        model = bert_dir
        count = staticmethod(lambda thorough, quick, cpu: cpu)

    return Small(tmp_path, "cuda:0", True)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, on which a capture is the step run again."""

    monkeypatch.setattr(Recorder, "record", lambda self, run: step_again(run))
    with pretended.one_gpu():
        yield


@needs_pretending
@pytest.mark.parametrize("name", ["steps", "graphs", "masks", "gradients"])
def test_the_checks_of_steps_pass_on_a_pretended_gpu(setting, gpu, name):
    assert gpu_check.CHECKS[name](setting)["summary"]


@needs_pretending
@pytest.mark.parametrize("enough", [False, True])
def test_the_check_of_memory_wants_a_batch_to_be_divided(setting, gpu, monkeypatch, enough):
    plain, limits = Glue.loss, [1.0]

    def loss(self, net, batch):
        if limits[-1] < 1 and len(batch.lengths) > 20 and not enough:
            raise torch.OutOfMemoryError("no room")
        return plain(self, net, batch)

    monkeypatch.setattr(Glue, "loss", loss)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**32))
    if enough:
        with pytest.raises(AssertionError, match="no batch was taken in parts"):
            step_checks.memory(setting)
    else:
        assert step_checks.memory(setting)["GiB limit"] == 1
    assert limits == [1.0, 0.25, 1.0]


@needs_pretending
@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("steps", lambda loss: loss * float("nan"), "a loss is not finite"),
        (
            "steps",
            lambda loss: loss * torch.rand(1, generator=torch.Generator().manual_seed(torch.seed())).item(),
            "other losses",
        ),
        ("steps", lambda loss: loss * float(loss.detach() > 0), "the host waits"),
        ("gradients", lambda loss: loss * (1.0 + 0.1 * (loss.device.type == "cuda")), "gradients differ"),
    ],
)
def test_a_check_fails_where_it_should(setting, gpu, monkeypatch, name, fault, words):
    plain = Glue.loss
    monkeypatch.setattr(Glue, "loss", lambda self, net, batch: fault(plain(self, net, batch)))
    with pytest.raises((AssertionError, RuntimeError), match=words):
        gpu_check.CHECKS[name](setting)


def test_other_bits_after_a_kill_are_named(setting, monkeypatch, tmp_path):
    """Stand-ins for the runs: two folders of files."""
    plain = iter(["a", "b"])

    def call(words, folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        (folder / "runs" / "weights").write_text(next(plain))
        (folder / "runs" / "log.jsonl").write_text(str(folder))
        return "level 1/2"

    monkeypatch.setattr(checks, "call", call)
    monkeypatch.setattr(checks, "kill_in_level_1", lambda words, folder: None)
    monkeypatch.setattr(checks.Setting, "device", torch.device("cpu"))
    type(setting).data = tmp_path
    with pytest.raises(AssertionError, match="other bits after the kill: runs/weights"):
        checks.whole_run(setting)


# ---- going on after a failure ----


def test_each_check_is_written_down_and_a_gpu_in_doubt_ends_the_process(monkeypatch, tmp_path):
    def fail(words):
        raise RuntimeError(words)

    def skip(setting):
        raise checks.Skipped("no pytest")

    monkeypatch.setattr(gpu_check, "CHECKS", {
        "run": lambda setting: {"summary": "fine", "steps": 3},
        "tests": skip,
        "steps": lambda setting: fail("shapes differ\nand more"),
        "speed": lambda setting: fail("CUDA error: an illegal memory access was encountered"),
        "masks": lambda setting: {"summary": "never reached"},
    })  # fmt: skip
    setting = checks.Setting(tmp_path, "cpu", True)
    assert gpu_check.run_checks(["run", "tests", "steps", "speed", "masks"], setting)
    lines = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert [(line["check"], line["result"], line.get("summary")) for line in lines] == [
        ("run", "pass", "fine"),
        ("tests", "no pytest", None),
        ("steps", "FAIL", "RuntimeError: shapes differ"),
        ("speed", "FAIL", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ]
    assert lines[0]["figures"] == {"steps": 3}


@pytest.mark.parametrize(("code", "said"), [(0, "5 passed in 3 s"), (1, "5 passed, 2 errors in 3 s")])
def test_the_own_tests_pass_only_without_errors(setting, monkeypatch, code, said):
    calls = []

    def run(words, **_):
        calls.append(words)
        return SimpleNamespace(returncode=code, stdout=f"..\n{said}\n")

    monkeypatch.setattr(subprocess, "run", run)
    if code:
        with pytest.raises(AssertionError, match="2 errors"):
            checks.own_tests(setting)
    else:
        assert checks.own_tests(setting) == {"summary": said}
    assert any("test_cuda_path.py" in word for word in calls[0])
    assert any("test_step.py" in word for word in calls[0])


def test_kernels_are_read_off_torchs_profiler(monkeypatch):
    """Of its events those on the GPU, but for copies."""
    from bert_tickets.bench import timing as clock

    def event(name, kind, microseconds):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda: microseconds))

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("fmha_cutlassF", gpu, 30), event("gemm", gpu, 50), event("gemm", gpu, 50), event("cudaLaunchKernel", cpu, 9)]
    events += [event("Memcpy HtoD", gpu, 7), event("Memset (Device)", gpu, 7)]

    @contextlib.contextmanager
    def profile(activities, acc_events):
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    found = clock.kernels_of(lambda i: None, 2, torch.device("cpu"))
    assert (found.count, found.seconds) == (1.5, pytest.approx(65e-6))
    assert found.of("attention", "fmha") == ["fmha_cutlassF"]
    assert clock.short("void at::native::(anonymous namespace)::gemm<c10::Half, 4>(int)") == "gemm<Half, 4>(int)"


STAND_IN = """
import json, os, sys, time
lines = open("checks.jsonl", "a")
for name in sys.argv[1:]:
    if name == "masks":
        os._exit(9)
    if name == "speed":
        time.sleep(60)
    broken = name == "steps"
    line = {"check": name, "result": "FAIL" if broken else "pass", "seconds": 1.0, "summary": "broken" * broken}
    lines.write(json.dumps(line) + "\\n")
    lines.flush()
    if broken:
        sys.exit(3)
"""


def start(args, names, output):
    return subprocess.Popen([sys.executable, "-c", STAND_IN, *names], cwd=output, start_new_session=True)


def run_check(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu", "--output", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as end:
        gpu_check.main(gpu_check.parse())
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["checks"]
    return end.value.code, {line["check"]: line for line in found}


def test_it_goes_on_after_a_check_that_fails_and_one_whose_process_dies(monkeypatch, tmp_path, capsys):
    code, found = run_check(monkeypatch, tmp_path, "--only", "run", "steps", "masks", "gradients", "memory")
    assert code == 1
    assert {name: line["result"] for name, line in found.items()} == {
        "run": "pass", "steps": "FAIL", "masks": "FAIL", "gradients": "pass", "memory": "pass"
    }  # fmt: skip
    assert "its process ended with 9" in found["masks"]["summary"]
    assert "broken" in capsys.readouterr().out


def test_what_takes_too_long_is_ended_and_the_rest_is_left_out(monkeypatch, tmp_path):
    code, found = run_check(monkeypatch, tmp_path, "--minutes", "0.05", "--only", "run", "speed", "masks")
    assert code == 1
    assert [found[name]["result"] for name in ("run", "speed", "masks")] == ["pass", "no time", "no time"]
    assert found["speed"]["summary"] == "ended at the limit"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "abacus"], "there is no check abacus"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--device", "cpu", "--output", "."], "has other files in it"),
    ],
)
def test_a_mistake_is_a_sentence(monkeypatch, tmp_path, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").write_text("kept")
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--output", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as end:
        gpu_check.run_command(gpu_check.main, gpu_check.parse())
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


# ---- what it makes ----


def test_a_generated_checkpoint_and_data_are_what_the_scripts_take(tmp_path):
    generated.save_bert(tmp_path / "bert", **checks.SMALL)
    net, tokenizer = load_bert(str(tmp_path / "bert"), "classifier", "pretrained", 0)
    assert net.config.vocab_size == len(tokenizer) == checks.SMALL["vocab_size"]
    generated.save_mnli(tmp_path, 300, 9)
    cfg = SimpleNamespace(data_dir=str(tmp_path), limit_train=None, limit_eval=None, max_length=128)
    train, evals = Glue("mnli").load_data(cfg, tokenizer, torch.device("cpu"))
    assert (len(train), {name: len(store) for name, store in evals.items()}) == (
        300, {"validation_matched": 9, "validation_mismatched": 9}
    )  # fmt: skip
    assert 36 < train.lengths.mean() < 45  # as MNLI's own
    assert set(train.labels.tolist()) == {0, 1, 2}
