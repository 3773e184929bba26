"""Which signals stop a run: those that neither its parent ignores nor its program handles."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from test_runner import wait_for

from bert_tickets.signals import STOP_SIGNALS, stop_signals

ALL = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}


def stopping(program: str = "", ignored: tuple[str, ...] = ()) -> set[str]:
    """The names of the stop signals of a process, after this program, whose parent ignores some."""

    def dispositions() -> None:
        for name in ALL:
            signal.signal(getattr(signal, name), signal.SIG_IGN if name in ignored else signal.SIG_DFL)

    program += (
        "; import signal; from bert_tickets.signals import STOP_SIGNALS; print(*(signal.Signals(n).name for n in STOP_SIGNALS))"
    )
    command, options = [sys.executable, "-c", program.lstrip("; ")], {"preexec_fn": dispositions, "cwd": ROOT}
    return set(subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout.split())


def test_what_a_parent_ignores_or_the_program_handles_is_left_alone():
    assert stopping() == ALL
    assert stopping(ignored=("SIGHUP",)) == ALL - {"SIGHUP"}  # nohup
    assert stopping(ignored=("SIGINT", "SIGQUIT")) == ALL  # `&` in a shell script
    assert stopping("import signal; signal.signal(signal.SIGUSR2, print)") == ALL - {"SIGUSR2"}  # submitit


def test_handlers_are_those_of_before_when_the_block_ends():
    before, received = [signal.getsignal(number) for number in STOP_SIGNALS], []
    with stop_signals(received.append):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
    assert received == STOP_SIGNALS
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_another_thread_has_none():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def block() -> None:
        with stop_signals(print):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_process_gets_sigterm_when_its_torchrun_is_killed():
    """From its first moments: while it loads or waits for the others, nothing else would end it."""
    waits = "import time; time.sleep(60)"
    child = f"from bert_tickets.cli import run_command; run_command(lambda: (print('up', flush=True), exec('{waits}')))"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); {waits}"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "1"}
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout.readline() == "up\n"
    process.kill()
    assert process.communicate(timeout=30) == ("", None)  # the pipe is closed: the child ended


@pytest.mark.parametrize("forwarded", [False, True])
def test_a_warning_to_torchrun_saves_once_and_stops_all_processes(commands, tmp_path, forwarded):
    """SIGUSR1 kills torchrun, unless PET_SIGNALS_TO_HANDLE says that it forwards it."""
    words = [*commands["lt_glue.py"], "--levels", "1", "--max-steps", "100000"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "lt_glue.py"),
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"} if forwarded else {})
    with (tmp_path / "said").open("w") as said:
        torchrun = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
    wait_for(lambda: list(tmp_path.glob("runs/*/train.jsonl")), 120)
    torchrun.send_signal(signal.SIGUSR1)
    assert torchrun.wait(60) == (1 if forwarded else -signal.SIGUSR1)
    wait_for(lambda: not list(tmp_path.glob("runs/*/lock.holder")))
    assert list(tmp_path.glob("runs/*/checkpoint.safetensors"))
    wait_for(lambda: "the same command resumes" in (tmp_path / "said").read_text())
    time.sleep(0.5)
    assert (tmp_path / "said").read_text().count("the same command resumes") == 1
