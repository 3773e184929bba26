"""Commands as Ray tasks: exit codes, retries, stops, losses. With Ray in processes of their own, as a user runs it."""

import _thread
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import quick_runs
import sweep as script
import torch
from conftest import ROOT

from bert_tickets.cli import parse, run_command
from bert_tickets.errors import UserError
from bert_tickets.methods import main
from bert_tickets.runs.directory import run_dir
from bert_tickets.sweep import runner
from bert_tickets.sweep.runner import execute

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # of the test's own cluster
SAVES = "trap 'sleep 0.3; echo saved >> told; exit 143' TERM; echo began >> told; while :; do sleep 0.05; done"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- a command, without Ray ----


def executed(folder: Path, command: str) -> None:
    execute(command, str(folder), {"GIVEN": "value"}, str(folder / "log"))


def test_the_exit_code_decides_what_is_raised(tmp_path):
    executed(tmp_path, "echo $GIVEN; pwd")
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["value", str(tmp_path)]
    for command, kind, code in (("exit 2", UserError, 2), ("exit 1", RuntimeError, 1), ("kill -9 $$", RuntimeError, -9)):
        with pytest.raises(kind, match=f"exit code {code}"):
            executed(tmp_path, command)


def test_a_run_whose_directory_is_held_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "BUSY_WAIT", 0.01)
    executed(tmp_path, "echo try >> tries; [ $(wc -l < tries) -gt 3 ] || exit 75")
    assert (tmp_path / "tries").read_text() == "try\n" * 4


@pytest.mark.parametrize("command", [SAVES, f"cd . && bash -c {shlex.quote(SAVES)}; true"])
def test_a_cancelled_task_stops_its_command_and_waits_until_it_has_saved(tmp_path, command):
    def interrupt() -> None:
        wait_for((tmp_path / "told").exists)
        _thread.interrupt_main()  # as ray.cancel does

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        executed(tmp_path, command)
    if command != SAVES:  # the shell ends before the command that it runs
        wait_for(lambda: "saved" in (tmp_path / "told").read_text())
    assert (tmp_path / "told").read_text().split() == ["began", "saved"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the signal at a parent's death is Linux's")
def test_a_command_stops_when_its_worker_is_killed(tmp_path):
    body = f"from bert_tickets.sweep.runner import execute; execute({SAVES!r}, '.', {{}}, 'log')"
    with subprocess.Popen([sys.executable, "-c", body], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as worker:
        wait_for((tmp_path / "told").exists)
        worker.kill()
    wait_for(lambda: (tmp_path / "told").read_text().split() == ["began", "saved"])


# ---- sweeps on Ray ----


def sweep(folder: Path, lines: list[str], *words: object) -> subprocess.Popen[str]:
    """`sweep.py` in `folder`, with these lines as its standard input."""
    pytest.importorskip("ray")
    (folder / "lines").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *map(str, words)]
    environment = ENVIRONMENT | (TOKEN if "--address" in words else {})
    with (folder / "lines").open() as given:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def swept(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """The exit code and output of a sweep at its end."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, said


def test_a_stopped_sweep_goes_on_and_a_finished_one_answers_at_once(tmp_path, monkeypatch):
    """On Ray itself, with runs that do not train."""
    shutil.copy(quick_runs.__file__, tmp_path / "lt_glue.py")
    imp = "python lt_glue.py --task rte"
    imps = [imp, f"{imp} --seed 2"]
    masks = [run_dir(parse("glue", None, shlex.split(line)[2:])) / "level_07" / "mask.safetensors" for line in imps]
    good = [f"{imp} --mask {masks[0]}", imp]
    (tmp_path / "slow").touch()
    process = sweep(tmp_path, good)
    wait_for(lambda: list(tmp_path.glob("runs/*/level_00/mask.safetensors")), 120)
    process.send_signal(signal.SIGUSR1)
    code, said = swept(process)
    assert code == 128 + signal.SIGUSR1, said
    assert "the same command resumes" in said
    assert (tmp_path / "saved").exists()
    assert len(list(tmp_path.glob("runs/rte-*"))) == 1  # the transfer was not started

    (tmp_path / "slow").unlink()
    flaky = "echo try >> tries; [ $(wc -l < tries) = 2 ]"
    code, said = swept(sweep(tmp_path, [*good, imp, f"{imp} --mask {masks[1]}", imps[1], flaky], "--retries", "2"))
    assert code == 1, said
    assert "6 lines, 5 jobs: 0 already finished, 5 to run" in said
    assert "3 done, 1 failed, 1 not run" in said
    assert (tmp_path / "tries").read_text() == "try\n" * 2
    assert said.count(f") started on {socket.gethostname()}: {imps[1]}\n") == 1, said  # a user's mistake is not tried again
    assert said.count(f"failed (exit code 2): {imps[1]}\n") == 2  # when it ended, and in the report
    assert "  | error: an unlucky number" in said
    assert f"not run (it needs <stdin>, line 5: {imps[1]}): python lt_glue.py" in said

    for name in ("ray", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}:{ROOT}")
    code, said = swept(sweep(tmp_path, [*good, *good]))
    assert (code, said.splitlines()) == (0, ["4 lines, 2 jobs: 2 already finished, 0 to run", "2 done, 0 failed, 0 not run"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lines --gpus 1.5", "--gpus 1.5: must be a fraction of one GPU, or a whole number"),
        ("lines --cpus 0", "--cpus 0.0: must be above 0"),
        ("nowhere.txt", "nowhere.txt"),
        ("lines", "lines, line 2: there is no task 'nli'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("lines").write_text("# a comment\npython lt_glue.py --task nli\n")
    monkeypatch.setattr("sys.argv", ["sweep.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        run_command(script.main, script.parse())
    assert end.value.code == 2
    assert said in capsys.readouterr().err


TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
print("killed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """Two nodes on this machine. Prints their address; a line on its standard input kills the second with SIGKILL."""
    command = [sys.executable, "-c", TWO_NODES]
    process = subprocess.Popen(command, env=ENVIRONMENT | TOKEN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.communicate("\n\n", timeout=60)


def results(folder: Path) -> dict[str, bytes]:
    found = [*folder.rglob("results.jsonl"), *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.cluster
def test_the_runs_of_a_lost_node_go_on_elsewhere_with_the_same_bytes(tmp_path, cluster, commands, monkeypatch):
    on_ray, plain = tmp_path / "swept", tmp_path / "plain"
    on_ray.mkdir()
    plain.mkdir()
    words = [*commands["lt_glue.py"], *["--levels", "2", "--rate", "0.3", "--max-steps", "400", "--save-steps", "50", "--seed"]]
    lines = [shlex.join(["python", f"{ROOT}/lt_glue.py", *words, seed]) for seed in "12"]
    process = sweep(on_ray, lines, "--address", cluster.stdout.readline().strip())
    wait_for(lambda: len(list(on_ray.glob("runs/*/checkpoint.safetensors"))) == 2, 180)  # both runs are under way
    cluster.stdin.write("\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "killed\n"
    code, said = swept(process)
    assert code == 0, said
    assert said.count("started on") == 3
    assert any('"resume"' in log.read_text() for log in on_ray.rglob("log.jsonl"))
    monkeypatch.chdir(plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in "12":
        main.run(parse("glue", None, [*words, seed]))
    torch.set_num_threads(threads)
    assert results(on_ray) == results(plain) != {}
