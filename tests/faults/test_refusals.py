"""A file system that refuses: the run says so, and nothing that was there is lost.

`-m faults` is the campaign: hundreds of refused calls. A sample of it is run with the other tests.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from campaign import VARIANTS, Bench, Variant, contents, table
from refusals import Refusal, finished
from victims import End

from bert_tickets.runs.directory import seconds
from bert_tickets.runs.verify import SOUND, verify

REASONS = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "the disk quota is used up",
    "EROFS": "the file system is read-only",
    "EACCES": "permission is denied",
    "EIO": os.strerror(errno.EIO),
}
# What a run can do without: it ends with the undisturbed bytes.
DISPENSABLE = r".* of the token cache|removal of .*|write of the lock|reading of the log"
READING = itertools.cycle(["EACCES", "EIO"])
SENTENCE = r"^error: (?:cannot (?:write|remove|read)|the system refuses) (\S+): (.+?)\. What was there before is intact"
TEMPORARY = re.compile(r"/\.((?:level_\d\d)|(?:[\w-]+\.\w+))(?:\.[^/]+)?\.tmp")  # of a level's folder, or of a file


def check_refused(refusal: Refusal, end: End, folder: Path, expected: dict[str, bytes], *, tidy: bool = True) -> None:
    """A run that was refused a call ended in a sentence, and what was there is there; or it did without."""
    assert "Traceback" not in end.said, (refusal, end.said)
    assert not re.search("Exception ignored|begins again", end.said), (refusal, end.said)
    assert end.refused is not None
    if end.code == 0 and refusal.place == "open of the lock":  # all levels were done: such a run is only read
        assert finished(folder) == end.refused["files"], refusal
        return
    if end.code == 0:
        assert re.fullmatch(DISPENSABLE, refusal.place), (refusal, end.said)
        assert contents(folder) == expected, refusal
        return
    assert end.code == 2, (refusal, end)
    assert finished(folder) == end.refused["files"], refusal
    if refusal.place == "reading of the token cache" and "was written and cannot be read back" in end.said:
        return  # a corpus
    told = re.search(SENTENCE, end.said, re.MULTILINE)
    assert told, (refusal, end.said)
    assert told[2] == REASONS[refusal.error], (refusal, end.said)
    named, *paths = (Path(TEMPORARY.sub(r"/\1", path)) for path in [told[1], *end.refused["paths"]])
    assert any(named in (path, *path.parents) or path in named.parents for path in paths), (refusal, named, paths)
    for run in (folder / "runs").glob("*"):
        check_sound(run, tidy=tidy and not refusal.lasting and not refusal.place.startswith("removal"))


def check_sound(run: Path, *, tidy: bool) -> None:
    """All files of a run are sound, but that results.jsonl may be of the levels before; if `tidy` there is no other file."""
    for path, verdict in verify(run):
        fine = verdict == SOUND or verdict.startswith(("not checked", "left by a kill"))
        unborn = verdict.startswith("is missing") and path.name in ("run.json", "results.jsonl")
        assert fine or unborn or path.name == "results.jsonl", (path, verdict)
        assert not tidy or not verdict.startswith("left by"), path


def refuse(bench: Bench, rng: random.Random, variant: Variant, refusals: list[Refusal]) -> None:
    """Run into each of the refusals, some of them one after the other in one directory, and hold every one that is then left
    alone against the undisturbed run."""
    _, expected = bench.undisturbed(variant)
    while refusals:
        folder, tried = bench.folder(), []
        for _ in range(rng.choice([1, 2, 3])):
            if not refusals:
                break
            tried.append(refusals[-1])
            end = bench.run(folder, variant, refusals[-1])
            if end.refused is None:  # the run before had gone too far: another directory takes it
                assert len(tried) > 1, (tried, end)
                assert end.code == 0, (tried, end)
                break
            check_refused(refusals.pop(), end, folder, expected, tidy=len(tried) == 1)
        end = bench.run(folder, variant)
        assert end.code == 0, (variant, tried, end.said)
        assert contents(folder) == expected, (variant, tried)
        (run,) = (folder / "runs").iterdir()
        assert sorted(seconds(run)) == [0, 1, 2], (variant, tried)
        shutil.rmtree(folder)


def draw(rng: random.Random, bench: Bench, variant: Variant, errors: itertools.cycle[str], most: int) -> list[Refusal]:
    """For each place of a run some of its calls, at most so many, each refused with the next error, for once or for good."""
    folder = bench.folder()
    end = bench.run(folder, variant, Refusal())
    assert end.code == 0, end.said
    assert contents(folder) == bench.undisturbed(variant)[1]
    shutil.rmtree(folder)
    return [
        Refusal(place, call, next(READING if place.startswith("reading") else errors), rng.random() < 0.5)
        for place, count in sorted(end.calls.items())
        for call in rng.sample(range(1, count + 1), min(most, count))
    ]


def test_some_refused_calls_lose_nothing(bench):
    rng = random.Random(57)
    drawn = draw(rng, bench, VARIANTS[0], itertools.cycle(rng.sample(list(REASONS), len(REASONS))), 1)
    refuse(bench, rng, VARIANTS[0], rng.sample(drawn, 6))


def unread(
    bench: Bench, rng: random.Random, variant: Variant, most: int, only: str = "reading of .*"
) -> Counter[tuple[str, str]]:
    """Go on with a run that was killed in its last level, some readings of each kind of file refused, at most so many."""
    source, expected, done = bench.source(variant, finished=False), bench.undisturbed(variant)[1], Counter()
    calls = bench.run(Path(shutil.copytree(source, bench.folder())), variant, Refusal()).calls
    for place in sorted(place for place in calls if re.fullmatch(only, place)):
        for call in rng.sample(range(1, calls[place] + 1), min(most, calls[place])):
            folder = Path(shutil.copytree(source, bench.folder()))
            refusal = Refusal(place, call, next(READING))
            check_refused(refusal, bench.run(folder, variant, refusal), folder, expected)
            assert bench.run(folder, variant).code == 0
            assert contents(folder) == expected, refusal
            shutil.rmtree(folder)
            done[refusal.error, place] += 1
    return done


def test_a_checkpoint_that_cannot_be_read_now_is_not_begun_over(bench):
    assert unread(bench, random.Random(57), VARIANTS[0], 2, "reading of a checkpoint").total() == 2


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_readings_that_are_refused(bench, seed, figures):
    began, rng, done = time.monotonic(), random.Random(seed), Counter()
    for variant in (VARIANTS[2], VARIANTS[8]):
        done += unread(bench, rng, variant, 9)
    figures.append(f"refused readings of runs that go on (seed {seed}): {done.total()}, {time.monotonic() - began:.0f} s")
    figures.extend(table(done, ["EACCES", "EIO"], "place"))


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_hundreds_of_refused_calls(bench, seed, figures):
    began, rng, done = time.monotonic(), random.Random(seed), Counter()
    errors = itertools.cycle(rng.sample(list(REASONS), len(REASONS)))
    for variant in VARIANTS:
        drawn = draw(rng, bench, variant, errors, 1)
        drawn = rng.sample(drawn, len(drawn) if variant[1] == "--keep-models" else 22)  # it alone has a kept model's places
        done.update((refusal.error, refusal.place) for refusal in drawn)
        refuse(bench, rng, variant, drawn)
    assert done.total() >= 200
    figures.append(f"refused calls of the file system (seed {seed}): {done.total()}, {time.monotonic() - began:.0f} s")
    figures.extend(table(done, list(REASONS), "place"))
