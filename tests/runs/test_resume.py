"""A run that is killed at any moment and started again ends as if nothing had happened."""

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tqdm import tqdm
from trainrun import THREE_LEVELS, Killed, Runs, dying

from bert_tickets.errors import Stopped
from bert_tickets.files import write_checksummed
from bert_tickets.runs import prepare as preparing
from bert_tickets.runs import session, writer
from bert_tickets.runs.directory import events, failure, seconds
from bert_tickets.runs.integrity import problems
from bert_tickets.signals import STOP_SIGNALS
from bert_tickets.training.step import Step

VARIANTS = [
    *(
        ("lt_glue.py", words)
        for words in ("", "--eval-steps 2 --report best", "--protocol released", "--rewind 3 --prunable matrices+biases")
    ),
    ("lt_glue.py", "--rewind none --prune-first --decay once --prunable matrices+embeddings --grad-accum 2"),
    ("lt_squad.py", "--eval-steps 3"),
    ("lt_pretrain.py", "--protocol released"),
    ("lt_pretrain.py", "--prunable matrices+embeddings"),
]


@pytest.fixture(scope="module")
def expected(commands, tmp_path_factory):
    """The files of an undisturbed run, by path."""
    with pytest.MonkeyPatch.context() as patch:
        return Runs("lt_glue.py", [*commands["lt_glue.py"], *THREE_LEVELS], tmp_path_factory.mktemp("expected"), patch)("run")


@pytest.mark.parametrize(("script", "variant"), VARIANTS, ids=lambda value: value.removesuffix(".py"))
def test_a_run_killed_again_and_again_ends_bit_identical(runs, monkeypatch, variant):
    """The run dies at its 6th step, is started again, dies at the 6th from there, and so on until it is through."""
    expected, deaths = runs("undisturbed", *variant.split()), 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", dying(Step.__call__, 6))
            try:
                found = runs("killed", *variant.split())
                break
            except Killed:
                deaths += 1
    assert deaths >= 2
    assert found == expected
    assert list(problems(runs.dir("killed"))) == []


@pytest.mark.parametrize(("target", "name", "pace"), [(os, "fsync", 9), (Path, "replace", 5), (Path, "rename", 1)])
def test_a_run_killed_in_its_writes_ends_bit_identical(runs, monkeypatch, target, name, pace):
    """Before and after flushes and renames in turn, all through a run, until it is killed in none."""
    expected, at, deaths = runs("undisturbed", "--rewind", "3", "--levels", "2"), 1, 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, dying(getattr(target, name), at, before=deaths % 2 == 0))
            try:
                runs(f"killed-{at}", "--rewind", "3", "--levels", "2")
                break
            except Killed:
                deaths += 1
        assert runs(f"killed-{at}", "--rewind", "3", "--levels", "2") == expected, at
        at += pace
    assert deaths >= 2


def test_files_are_flushed_before_their_rename_and_folders_after(runs, monkeypatch):
    """Otherwise a power cut leaves an empty file in place."""
    flushed, unflushed, moved = set(), set(), 0
    sync, plain, unlink = os.fsync, {name: getattr(Path, name) for name in ("rename", "replace")}, Path.unlink

    def flush(descriptor: int) -> None:
        state = os.fstat(descriptor)
        flushed.add((state.st_ino, state.st_mtime_ns))
        unflushed.discard(state.st_ino)
        sync(descriptor)

    def move(name: str, path: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        for place in [path, *path.rglob("*")]:
            assert (place.stat().st_ino, place.stat().st_mtime_ns) in flushed, place
        unflushed.add(target.parent.stat().st_ino)
        return plain[name](path, target)

    def remove(path: Path, **options: bool) -> None:
        assert not unflushed, path  # the file that replaces it may not be there
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "unlink", remove)
    for name in plain:
        monkeypatch.setattr(Path, name, lambda path, target, name=name: move(name, path, target))
    runs("run", "--rewind", "3", "--keep-models")
    assert moved > 20
    assert not unflushed


def kill_self(*names: str) -> Callable[[], None]:
    """Send these signals to this process."""
    return lambda: [os.kill(os.getpid(), getattr(signal, name)) for name in names] and None


SAVING = [
    *((signal.Signals(number).name,) for number in STOP_SIGNALS),
    ("SIGUSR1", "SIGTERM"),
    ("SIGXCPU",) * 3,
    ("SIGTERM", "SIGINT"),
    ("SIGTERM", "SIGTERM"),
]


@pytest.mark.parametrize("names", SAVING, ids="-".join)
def test_signals_save_and_stop(runs, expected, monkeypatch, names):
    """Several: a scheduler warns, and then ends the job."""
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying(Step.__call__, 9, by=kill_self(*names)))
        with pytest.raises(Stopped, match=r"level 1 after step 3, saved in runs/.*the same command resumes") as stop:
            runs("stopped")
    assert stop.value.code == 128 + getattr(signal, names[-1])
    run = runs.dir("stopped")
    assert (run / "checkpoint.safetensors").exists()
    assert runs("stopped") == expected
    assert not (run / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(("name", "seconds"), [("SIGTERM", 3), ("SIGINT", 0.1)])
def test_the_same_signal_again_stops_at_once(runs, monkeypatch, name, seconds):
    """SIGTERM after two seconds: a scheduler may send it to each process of a job, and a sweep forward it to its command."""

    def signals() -> None:
        kill_self(name)()
        later = time.monotonic() + seconds
        monkeypatch.setattr(writer.time, "monotonic", lambda: later)
        kill_self(name)()

    monkeypatch.setattr(Step, "__call__", dying(Step.__call__, 9, by=signals))
    with pytest.raises(Stopped, match=r"^stopped; all that was saved is in runs/"):
        runs("run")


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_run_whose_terminal_is_closed_saves(runs, monkeypatch, number):
    """Or whose output nobody reads: Ctrl-C ends also the `tee` behind it."""

    class Terminal(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(number, os.strerror(number))
            return super().write(text)

    terminal = Terminal()

    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(os, "write", lambda _, text: terminal.write(text.decode()))
    monkeypatch.setattr(tqdm, "update", lambda bar: bar.fp.write("|"))  # at every step
    step = dying(Step.__call__, 8, by=lambda: setattr(terminal, "gone", True))
    monkeypatch.setattr(Step, "__call__", dying(step, 9, by=kill_self("SIGTERM")))
    with pytest.raises(Stopped, match="level 1 after step 3, saved"):
        runs("run")


def test_a_run_in_another_thread_works_without_signals(runs, expected):
    found = {}
    thread = threading.Thread(target=lambda: found.update(runs("run")))
    thread.start()
    thread.join()
    assert found == expected


def test_a_signal_before_the_first_level_stops_at_once(runs, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "prepare", dying(preparing.prepare, 1, by=lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Stopped, match=r"^stopped; the same command starts again$"):
            runs("run")
    assert list((runs.place / "run" / "runs").iterdir()) == []  # nothing was begun
    assert runs("run") == expected


def test_no_level_is_trained_again_not_even_one_killed_in_its_evaluation(runs, monkeypatch):
    expected = runs("undisturbed", "--save-steps", "4")
    monkeypatch.setattr("bert_tickets.runs.checkpoint.EVALUATION", 0.0)  # minutes; a level here takes less than a second
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", dying(session.evaluate, 2))
        with pytest.raises(Killed):
            runs("run", "--save-steps", "4")
    taken, plain = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *arguments: (taken.append(1), plain(*arguments))[1])
    assert runs("run", "--save-steps", "4") == expected
    assert len(taken) == 6  # of level 2


def test_what_a_kill_leaves_is_removed_and_torn_logs_are_appended_to(runs, expected):
    run = runs.killed_at(9, "run")
    (run / ".checkpoint.safetensors.elsewhere.1.tmp").write_bytes(b"half")
    (run / ".level_07.tmp").mkdir()
    (run / ".level_07.tmp" / "mask.safetensors").write_bytes(b"half")
    for name in ("train.jsonl", "log.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"event": "le')
    assert runs("run") == expected
    assert sorted(seconds(run)) == [0, 1, 2]
    steps = [(line["level"], line["step"]) for line in events(run / "train.jsonl")]
    assert steps == [(level, step) for level in range(3) for step in (2, 4, 6)]
    assert [event["event"] for event in events(run / "log.jsonl")] == ["start", "level", "resume", "level", "level"]


@pytest.mark.parametrize("content", [b"{}", None])
def test_a_damaged_or_outdated_failure_is_removed(runs, expected, content):
    run = runs.killed_at(9, "run")
    line = {"run": run.name, "task": "rte", "level": 0, "ended": "the loss became nan"}  # level 0 is finished
    write_checksummed(run / "failure.json", line) if content is None else (run / "failure.json").write_bytes(content)
    assert failure(run) is None
    assert runs("run") == expected


# ---- the disk ----


def full(*_: object) -> None:
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("at", [1, 9, 16])
def test_a_full_disk_ends_the_run_and_loses_nothing(runs, expected, monkeypatch, at):
    def fill() -> None:
        patch.setattr(os, "fsync", full)  # and it stays full
        full()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync, at, by=fill))
        with pytest.raises(OSError, match="No space left on device"):
            runs("run")
    assert not list(runs.place.glob("run/runs/*/.*"))  # temporary files may be what fills the disk
    assert runs("run") == expected


def test_a_full_disk_under_a_kept_model_is_an_os_error(runs, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match=r"cannot write runs/.*/model: .*No space left"):
        runs("run", "--keep-models")
    assert not list(runs.place.glob("run/runs/*/.*"))
