"""The loop of a sweep over an executor that only pretends: failures, losses, skips, busy directories, stops; and its view."""

import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_jobs import IMP, MAKERS, imp_dir, make_levels, write_mask

from bert_tickets.runs.directory import levels_of
from bert_tickets.sweep import view as views
from bert_tickets.sweep.jobs import Job, plan, read_lines
from bert_tickets.sweep.runner import GRACE, LOSSES, Ended, Sweep, duration
from bert_tickets.sweep.view import View, last_lines, report


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Pretence:
    """An executor of some places whose commands take a given time and end as told, in a time of its own.

    `ends` tells a title's exit codes, try by try (None: lost; then 0). A run that ends well leaves its directory or file.
    """

    def __init__(self, places: int = 2, ends: dict[str, list[int | None]] | None = None, seconds: float = 10.0) -> None:
        self.now, self.places, self.ends, self.seconds = 0.0, places, dict(ends or {}), seconds
        self.running: dict[Job, float] = {}
        self.started: list[str] = []
        self.asked_to_stop = 0
        self.most = 0

    def clock(self) -> float:
        return self.now

    def room(self, wanted: int) -> int:
        return self.places - len(self.running)

    def start(self, job: Job) -> str:
        assert job not in self.running
        self.started.append(job.title)
        self.running[job] = self.now + self.seconds
        self.most = max(self.most, len(self.running))
        assert self.most <= self.places
        return "here"

    def wait(self, seconds: float) -> list[Ended]:
        self.now += seconds
        over = [job for job, at in self.running.items() if at <= self.now]
        return [self.end(job) for job in over]

    def end(self, job: Job) -> Ended:
        del self.running[job]
        codes = self.ends.get(job.title, [])
        code = codes.pop(0) if codes else 0
        if code == 0:
            leave(job, self.sweep)
        return Ended(job, code)

    def stop(self) -> None:
        self.asked_to_stop += 1
        for job in self.running:
            self.ends[job.title] = [143]
            self.running[job] = self.now + 3


def leave(job: Job, sweep: Sweep) -> None:
    """What a run of it would leave: levels with masks that differ, a mask."""
    made = sweep.at[job].target
    if job.cfg:
        make_levels(made, levels_of(job.cfg))
        for level in range(levels_of(job.cfg)):
            write_mask(made / f"level_{level:02d}" / "mask.safetensors", seed=level)
    elif job.output:
        write_mask(job.output, seed=len(str(job.output)))


def swept(*texts: str, retries: int = 1, **pretence) -> tuple[Sweep, Pretence, list[str]]:
    """The sweep of these lines, run to its end; what was started; what was said."""
    executor, said = Pretence(**pretence), []
    executor.sweep = Sweep(plan(read_lines("l", "\n".join(texts)), MAKERS), retries, said.append, executor.clock)
    executor.sweep.go(executor, lambda: None)
    assert executor.now < 86400, "it did not end by itself"
    return executor.sweep, executor, said


def states(sweep: Sweep) -> list[str]:
    return [sweep.at[job].state for job in sweep.jobs]


# ---- order ----


def test_what_needs_a_mask_runs_after_what_makes_it():
    of_imp = f"{IMP} --mask {imp_dir()}/level_07/mask.safetensors"
    lines = [f"{IMP} --mask m", of_imp, "python oneshot.py --rate 0.5 --output m", IMP]
    sweep, executor, _ = swept(*lines, places=4)
    assert states(sweep) == ["done"] * 4
    assert executor.started[:2] == [sweep.jobs[2].title, sweep.jobs[3].title]
    assert executor.now == pytest.approx(21, abs=2)  # two rounds


def test_places_are_filled_and_not_overfilled_in_the_lines_order():
    _, executor, _ = swept(*(f"echo {i}" for i in range(7)), places=3)
    assert executor.most == 3
    assert executor.started == [f"echo {i}" for i in range(7)]
    assert executor.now == pytest.approx(30, abs=3)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_whatever_fails_nothing_runs_before_its_needs_or_twice_after_success(tmp_path_factory, data):
    """Random chains and forests of masks from weights, random ends: the loop ends, and in order."""
    folder = tmp_path_factory.mktemp("any")
    count = data.draw(st.integers(1, 7))
    lines, needs = [], {}
    for i in data.draw(st.permutations(range(count))):
        needs[i] = data.draw(st.none() | st.integers(0, i - 1)) if i else None
        init = "" if needs[i] is None else f" --init {folder}/{needs[i]}"
        lines.append(f"python oneshot.py --rate 0.5 --output {folder}/{i}{init}")
    jobs = {int(job.output.name): job for job in plan(read_lines("l", "\n".join(lines)), MAKERS)}
    codes = st.lists(st.sampled_from([0, 1, 2, None, 143, 75]), max_size=3)
    ends = {job.title: data.draw(codes) for job in jobs.values()}
    sweep, executor, _ = swept(*lines, ends={title: list(codes) for title, codes in ends.items()})
    state = {int(job.output.name): sweep.at[job].state for job in sweep.jobs}
    assert set(state.values()) <= {"done", "failed", "skipped"}
    for i, need in needs.items():
        title = jobs[i].title
        if need is None or state[need] == "done":
            assert state[i] != "skipped"
        else:
            assert state[i] == "skipped"
            assert title not in executor.started
        if state[i] == "done":
            assert executor.started.count(title) == [*ends[title], 0].index(0) + 1
            if need is not None:
                assert executor.started.index(jobs[need].title) < executor.started.index(title)


# ---- nothing twice ----


def test_what_is_done_is_not_started():
    make_levels(imp_dir(), 10)
    for level in range(10):
        write_mask(imp_dir() / f"level_{level:02d}" / "mask.safetensors", seed=level)
    lines = [IMP, f"python lt_glue.py --task rte --mask {imp_dir()}/level_07/mask.safetensors"]
    sweep, executor, _ = swept(*lines)
    assert states(sweep) == ["done", "done"]
    assert executor.started == [sweep.jobs[1].title]
    again = Sweep(plan(read_lines("l", "\n".join(lines)), MAKERS), 1, pytest.fail)
    assert again.settle() == []
    assert again.over  # with no executor at all


def test_two_masks_of_equal_content_are_one_run(tmp_path):
    for name in ("a", "b"):
        write_mask(tmp_path / name)
    sweep, executor, _ = swept(f"{IMP} --mask a", f"{IMP} --mask b", places=2)
    assert states(sweep) == ["done", "done"]
    assert executor.started == [f"{IMP.partition(' ')[2]} --mask a"]


def test_the_second_of_equal_runs_shares_the_firsts_failure(tmp_path):
    for name in ("a", "b"):
        write_mask(tmp_path / name)
    sweep, executor, _ = swept(f"{IMP} --mask a", f"{IMP} --mask b", ends={"lt_glue.py --task mnli --mask a": [2]})
    assert states(sweep) == ["failed", "skipped"]
    assert "it is the same run as lt_glue.py --task mnli --mask a (l, line 1), which failed" in sweep.at[sweep.jobs[1]].why
    assert len(executor.started) == 1


def test_what_another_process_finished_meanwhile_is_not_started():
    executor = Pretence(places=1)
    sweep = executor.sweep = Sweep(plan(read_lines("l", f"echo 1\n{IMP}"), MAKERS), 1, lambda _: None, executor.clock)
    assert len(sweep.settle()) == 2
    make_levels(imp_dir(), 10)
    sweep.go(executor, lambda: None)
    assert executor.started == ["echo 1"]
    assert states(sweep) == ["done", "done"]


# ---- failures ----


def test_a_failure_is_tried_again_and_stops_nobody_else():
    sweep, executor, said = swept("echo 1", "echo 2", "echo 3", ends={"echo 1": [1], "echo 2": [1, -9]}, places=1)
    assert states(sweep) == ["done", "failed", "done"]
    assert [executor.started.count(f"echo {i}") for i in (1, 2, 3)] == [2, 2, 1]
    assert "failed (exit code 1) and is tried again: echo 1" in said
    assert "FAILED (exit code -9): echo 2" in said


@pytest.mark.parametrize(("retries", "code", "tries"), [(0, 1, 1), (3, 1, 4), (3, 2, 1)])
def test_as_many_tries_as_asked_for_but_one_for_a_users_mistake(retries, code, tries):
    sweep, executor, _ = swept("echo 1", ends={"echo 1": [code] * 9}, retries=retries)
    assert states(sweep) == ["failed"]
    assert len(executor.started) == tries


def test_what_needs_a_failed_one_is_not_run_and_says_why():
    makers = ["python oneshot.py --rate 0.5 --output a", "python oneshot.py --rate 0.5 --init a --output b"]
    lines = [*makers, f"{IMP} --mask b", "echo 1"]
    sweep, executor, _ = swept(*lines, ends={lines[0].partition(" ")[2]: [2]})
    assert states(sweep) == ["failed", "skipped", "skipped", "done"]
    assert sweep.at[sweep.jobs[1]].why == "it needs oneshot.py --rate 0.5 --output a (l, line 1), which failed"
    assert "(l, line 2), which was not run" in sweep.at[sweep.jobs[2]].why
    assert len(executor.started) == 2


def test_a_file_that_its_maker_did_not_leave_is_waited_for_and_then_said():
    lines = ["python oneshot.py --rate 0.5 --output a", f"{IMP} --mask a"]
    executor, said = Pretence(), []
    sweep = executor.sweep = Sweep(plan(read_lines("l", "\n".join(lines)), MAKERS), 1, said.append, executor.clock)
    executor.end = lambda job: executor.running.pop(job) and Ended(job, 0)
    sweep.go(executor, lambda: None)
    assert states(sweep) == ["done", "skipped"]
    assert "is not there, though what should make it is done" in sweep.at[sweep.jobs[1]].why
    assert 30 < executor.now < 120


# ---- losses ----


@pytest.mark.parametrize("how", [None, 143, -15])
def test_a_loss_is_no_failure(how):
    sweep, executor, said = swept("echo 1", ends={"echo 1": [how] * 5}, retries=0)
    assert states(sweep) == ["done"]
    assert len(executor.started) == 6
    assert any("lost on here" in line for line in said)


def test_but_it_is_not_for_ever():
    sweep, executor, _ = swept("echo 1", ends={"echo 1": [None] * 99})
    assert states(sweep) == ["failed"]
    assert sweep.at[sweep.jobs[0]].why.startswith(f"lost {LOSSES + 1} times")
    assert len(executor.started) == LOSSES + 1


def test_a_directory_that_is_held_is_tried_again_later_and_later():
    sweep, executor, said = swept(IMP, "echo 1", ends={IMP.partition(" ")[2]: [75] * 30, "echo 1": [75, 75]}, retries=0)
    assert states(sweep) == ["done", "failed"]  # of another program 75 is a failure like another
    assert executor.started.count(IMP.partition(" ")[2]) == 31
    assert executor.now > 20 * 60
    assert len([line for line in said if "another process holds its directory" in line]) == 1


# ---- stopping ----


def stopped_after(seconds: float, executor: Pretence, *texts: str) -> Sweep:
    sweep = executor.sweep = Sweep(plan(read_lines("l", "\n".join(texts)), MAKERS), 1, lambda _: None, executor.clock)

    def show() -> None:
        sweep.stopping = sweep.stopping or executor.now >= seconds

    sweep.go(executor, show)
    return sweep


def test_asked_to_stop_it_waits_for_what_runs_and_starts_nothing():
    executor = Pretence(places=2)
    sweep = stopped_after(15, executor, *(f"echo {i}" for i in range(6)))
    assert executor.asked_to_stop == 1
    assert states(sweep) == ["done"] * 2 + ["waiting"] * 4
    assert len(executor.started) == 4
    assert 18 <= executor.now < 20
    assert not executor.running


def test_but_not_for_ever():
    executor = Pretence(places=1, seconds=1e9)
    executor.stop = lambda: None
    sweep = stopped_after(5, executor, "echo 1")
    assert states(sweep) == ["running"]
    assert executor.now == pytest.approx(GRACE + 5, abs=2)


# ---- how long it will take ----


def test_time_left_is_unknown_until_one_of_the_kind_has_ended():
    executor = Pretence(places=2, seconds=100)
    left = {}
    texts = [f"echo {i}" for i in range(6)]
    sweep = executor.sweep = Sweep(plan(read_lines("l", "\n".join(texts)), MAKERS), 1, lambda _: None, executor.clock)
    sweep.go(executor, lambda: left.setdefault(round(executor.now), sweep.time_left()))
    assert left[50] is None
    assert left[102] == pytest.approx(200, abs=3)
    assert left[250] == pytest.approx(50, abs=4)


def test_time_left_knows_levels_and_chains():
    now = [0.0]
    mask = imp_dir() / "level_07" / "mask.safetensors"
    lines = [IMP, f"python lt_glue.py --task rte --mask {mask}", f"python lt_glue.py --task rte --mask {mask} --seed 3"]
    sweep = Sweep(plan(read_lines("l", "\n".join(lines)), MAKERS), 1, lambda _: None, lambda: now[0])
    sweep.settle()
    imp, one, _ = sweep.jobs
    sweep.at[imp].state = "running"
    make_levels(imp_dir(), 4)
    now[0] = 80.0
    sweep.at[one].seconds, sweep.at[one].state = 30.0, "done"
    assert sweep.time_left() == pytest.approx(120 + 30)  # six levels of 20 seconds, then the transfer that waits for them
    sweep.most = 4
    assert sweep.time_left() == pytest.approx(150)  # more places do not shorten a chain
    sweep.at[imp].levels_before = 2  # it went on from there
    assert sweep.time_left() == pytest.approx(80 / 2 * 6 + 30)


@pytest.mark.parametrize(("seconds", "said"), [(7.4, "0:00:07"), (3725, "1:02:05"), (86400 * 3 + 4 * 3600, "3 d 04:00:00")])
def test_durations(seconds, said):
    assert duration(seconds) == said


# ---- the view ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(stream, monkeypatch, lines: list[str], height: int = 24, **pretence) -> str:
    executor = Pretence(**pretence)
    monkeypatch.setattr(views.shutil, "get_terminal_size", lambda: os.terminal_size((40, height)))
    view = View(stream, executor.clock)
    sweep = executor.sweep = Sweep(plan(read_lines("l", "\n".join(lines)), MAKERS), 0, view.say, executor.clock)
    sweep.go(executor, lambda: view.show(sweep))
    view.clear()
    return stream.getvalue()


def screen(text: str) -> tuple[list[str], list[str]]:
    """What a terminal shows in the end, and all frames it showed before it was blanked."""
    lines, frames = [""], []
    parts = text.replace("\x1b[J", "\x1b[J\0").split("\x1b[")
    for part in parts:
        if part[:1].isdigit() and "F" in part[:4]:
            up, part = int(part.partition("F")[0]), part.partition("F")[2]
            frames.append("\n".join(lines))
            del lines[len(lines) - 1 - up :]
            lines.append("")
        else:
            part = part.removeprefix("J\0")
        first, *rest = part.split("\n")
        lines[-1] += first
        lines += rest
    return lines, frames


def test_on_a_terminal_a_block_is_redrawn_and_only_trouble_stays(monkeypatch):
    text = watched(Terminal(), monkeypatch, [IMP, "echo 1", "echo 2"], ends={"echo 1": [3]})
    left, frames = screen(text)
    assert [line for line in left if line] == ["FAILED (exit code 3): echo 1"]
    assert any("0 done, 2 running, 1 waiting, 0 fail" in frame and "0/10 levels" in frame for frame in frames)
    assert all(len(line) < 40 for frame in frames for line in frame.splitlines())


def test_a_block_is_no_higher_than_the_terminal(monkeypatch):
    _, frames = screen(watched(Terminal(), monkeypatch, [f"echo {i}" for i in range(20)], height=6, places=20))
    blocks = [frame for frame in frames if "20 running" in frame]
    assert blocks
    assert all(len(frame.splitlines()) == 5 and "and 17 more" in frame for frame in blocks)


def test_elsewhere_a_line_an_event_and_a_sign_of_life_a_minute(monkeypatch):
    text = watched(io.StringIO(), monkeypatch, ["echo 1", "echo 2"], places=1, seconds=140)
    assert "\x1b" not in text
    lines = [line.partition(" ")[2] for line in text.splitlines()]
    assert lines[0] == "started on here: echo 1"
    assert "done in 0:02:20: echo 1" in lines
    beats = [line for line in lines if "running" in line]
    assert len(beats) == 280 // 60
    assert beats[0] == "0 done, 1 running, 1 waiting, 0 failed; time left: unknown"
    assert beats[-1].startswith("1 done, 1 running, 0 waiting, 0 failed; time left: 0:0")


def test_the_report_names_each_that_failed_with_its_last_words(tmp_path):
    sweep, _, _ = swept("echo 1", "echo 2", ends={"echo 2": [1, 1]})
    log = tmp_path / sweep.jobs[1].name
    log.write_bytes(b"# first try\nold\n# second try\n" + b"a\n" * 20 + b"10%\r 50%\r100%\r\n\nerror: no room\n")
    text = report(sweep, lambda job: tmp_path / job.name)
    assert text.splitlines()[0] == "1 done, 1 failed"
    assert f"FAILED: echo 2\n  l, line 2: exit code 1; all of its output: {log}" in text
    assert text.splitlines()[-3:] == ["  | a", "  | 100%", "  | error: no room"]
    assert "old" not in text
    assert len(last_lines(log)) == 12
    assert last_lines(Path("nothing")) == []
