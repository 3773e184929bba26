"""Sweeps on Ray, as a user runs them: processes of their own, as Ray opens connections within the machine."""

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_session import SCRIPTS, wait_for

import oneshot
from bert_tickets.cli import parse
from bert_tickets.runs.directory import run_dir

pytest.importorskip("ray")

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # of the test alone


def sweep(folder: Path, lines: list[str], *words: object) -> subprocess.Popen[str]:
    """`sweep.py` with these lines on its standard input, in `folder`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "sweep.py"), *map(str, words)],
        cwd=folder,
        env=ENVIRONMENT | (TOKEN if "--address" in words else {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    process.stdin = None
    return process


def swept(folder: Path, lines: list[str], *words: object, timeout: float = 240) -> tuple[int, str]:
    process = sweep(folder, lines, *words)
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, said


def grid(commands: dict[str, list[str]], bert_dir: Path, steps: int, seeds: int = 1) -> list[str]:
    """Tickets by IMP, each carried over to SQuAD, and a random one; first what needs, last what is needed."""
    glue = shlex.join(["python", f"{ROOT}/lt_glue.py", *commands["lt_glue.py"]])
    squad = shlex.join(["python", f"{ROOT}/lt_squad.py", *commands["lt_squad.py"]])
    imps = [f"{glue} --levels 2 --rate 0.3 --max-steps {steps} --seed {seed}" for seed in range(seeds)]
    sources = [run_dir(parse("glue", None, shlex.split(line)[2:]), "glue") for line in imps]
    transfers = [f"{squad} --mask {source}/level_01/mask.safetensors" for source in sources]
    oneshot = f"python {ROOT}/oneshot.py --rate 0.3 --method random --model {bert_dir} --output masks/random.safetensors"
    return [f"{glue} --mask masks/random.safetensors", *transfers, oneshot, *imps]


def looped(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain loop: one line after the other, in this process to save the starts."""
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for line in lines:
        _, script, *words = shlex.split(line)
        module, preset = {**SCRIPTS, "oneshot.py": (oneshot, "")}[Path(script).name]
        module.main(parse(preset, None, words) if preset else module.parse(words))
    torch.set_num_threads(threads)


def results(folder: Path) -> dict[str, bytes]:
    found = [*folder.rglob("results.jsonl"), *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def events(folder: Path) -> list[str]:
    """What all runs wrote down of their course."""
    return [json.loads(line)["event"] for log in folder.rglob("log.jsonl") for line in log.read_text().splitlines()]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    for name in ("swept", "looped"):
        (tmp_path / name).mkdir()
    return tmp_path / "swept", tmp_path / "looped"


def test_stopped_and_called_again_it_ends_with_the_plain_loops_bytes_and_then_at_once(folders, commands, bert_dir, monkeypatch):
    on_ray, plain = folders
    lines = grid(commands, bert_dir, 200)
    process = sweep(on_ray, lines)
    wait_for(lambda: "start" in events(on_ray), 120)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert "stop" in events(on_ray)  # it saved before it ended

    code, said = swept(on_ray, [*lines, lines[-1], "python -c 'print(\"oh no\"); raise SystemExit(3)'"])
    assert code == 1, said
    assert "6 lines are 5 jobs, of which" in said
    assert "4 done, 1 failed" in said
    assert "  | oh no" in said
    looped(plain, lines[::-1], monkeypatch)
    assert results(on_ray) == results(plain)
    assert len(results(on_ray)) == 3 + 2 * 3 + 2  # results; mask a level, weights a run; the random mask and its own

    began = time.monotonic()
    code, said = swept(on_ray, [*lines, *lines])
    assert (code, said.splitlines()) == (0, ["8 lines are 4 jobs, of which 4 are done", "4 done, 0 failed"])
    assert time.monotonic() - began < 5  # without Ray, and without a process a line


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
    """Two nodes on this machine. It says their address; at a line on its standard input it kills the second with SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES], env=ENVIRONMENT | TOKEN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate("\n\n", timeout=60)


@pytest.mark.cluster
def test_a_lost_nodes_runs_go_on_elsewhere_and_end_with_the_same_bytes(folders, cluster, commands, bert_dir, monkeypatch):
    on_ray, plain = folders
    lines = [f"{line} --save-steps 100" if "lt_" in line else line for line in grid(commands, bert_dir, 800, seeds=2)]
    assert cluster.stdin
    assert cluster.stdout
    process = sweep(on_ray, lines, "--address", cluster.stdout.readline().strip(), "--retries", "0")
    wait_for(lambda: len(list(on_ray.glob("runs/*/checkpoint.safetensors"))) == 2, 180)  # both runs are under way
    cluster.stdin.write("\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "killed\n"
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "loss 1; it is started again" in said
    assert "resume" in events(on_ray)
    looped(plain, lines[::-1], monkeypatch)
    assert results(on_ray) == results(plain)
