"""Nothing is lost, and nothing silently wrong: runs that meet a signal or a disk error at any moment, and races of two starts.

`-m faults` is the campaign: a hundred kills, hundreds of disk errors, fifty races. The default run takes a sample of it.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from crash_harness import ANY_MOMENT, FILE_SYSTEM, PLACES, STEP, Fault, Harness, Job, Outcome
from trainrun import THREE_LEVELS, contents

from bert_tickets.files import read_facts
from bert_tickets.runs.directory import events
from bert_tickets.runs.integrity import problems

SIGNALS = ["SIGKILL", "SIGTERM", "SIGINT"]
ERRORS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"]
VARIANTS = [("lt_glue.py", words) for words in ("", "--rewind 3", "--rewind none", "--keep-models", "--protocol released")]
VARIANTS += [("lt_squad.py", words) for words in ("", "--rewind 3")] + [("lt_pretrain.py", words) for words in ("", "--rewind 3")]
SEARCHES = [("lt_glue.py", f"--method {method} --threshold 0") for method in ("importance", "guarded-magnitude")]
SEARCHES += [(script, "--method early-bird --draw-at 5") for script in ("lt_glue.py", "lt_pretrain.py")]
VARIANTS += SEARCHES


class Campaign:
    """Runs of the variants in the crash harness, each in a folder of its own."""

    def __init__(self, harness: Harness, commands: dict[str, list[str]], place: Path) -> None:
        self.harness, self.commands, self.place = harness, commands, place
        self._number = itertools.count()
        self._undisturbed: dict[tuple[str, str], tuple[Outcome, dict[str, bytes]]] = {}

    def folder(self) -> Path:
        """A folder that is not there yet."""
        return self.place / f"{next(self._number):04d}"

    def run(self, folder: Path, variant: tuple[str, str], fault: Fault | None = None) -> Outcome:
        script, words = variant
        levels = ["--save-steps", "2"] if variant in SEARCHES else THREE_LEVELS
        return self.harness.run(folder, script, [*self.commands[script], *levels, *words.split()], fault)

    def undisturbed(self, variant: tuple[str, str]) -> tuple[Outcome, dict[str, bytes]]:
        """How a run ends by itself, and its files."""
        if variant not in self._undisturbed:
            folder = self.folder()
            outcome = self.run(folder, variant)
            assert outcome.code == 0, outcome.output
            (run,) = (folder / "runs").iterdir()
            assert problems(run) == []
            self._undisturbed[variant] = outcome, contents(folder / "runs")
        return self._undisturbed[variant]


@pytest.fixture(scope="module")
def campaign(harness, commands, tmp_path_factory):
    return Campaign(harness, commands, tmp_path_factory.mktemp("faults"))


# ---- signals and disk errors ----


def draw(rng: random.Random, name: str, place: str, alone: Outcome) -> Fault:
    """A fault at a place, at a moment of a run that ends as `alone` when it is undisturbed."""
    if place == ANY_MOMENT:
        return Fault(name, after=rng.uniform(0, alone.seconds))
    twice = name in ("SIGTERM", "SIGINT") and rng.random() < 0.3
    return Fault(name, place, rng.randint(1, alone.calls[place]), name in ERRORS or rng.random() < 0.5, twice)


def check_outcome(fault: Fault, outcome: Outcome, folder: Path) -> bool:
    """Whether the fault struck the run, which must then have ended as it should."""
    assert "Traceback" not in outcome.output, outcome
    if fault.name in ERRORS:
        if outcome.code:
            assert outcome.code == 2, outcome
            assert len(re.findall("^error: ", outcome.output, re.MULTILINE)) == 1, outcome
        return outcome.calls[fault.place] >= fault.call
    if fault.name == "SIGKILL":
        assert outcome.code in (0, -9), outcome
        return outcome.code != 0
    if outcome.code == 0:  # its last level was trained already, or the signal came too late
        return "stopping after this step" in outcome.output
    number = {"SIGTERM": 15, "SIGINT": 2}[fault.name]
    if outcome.code == -number or (outcome.code == 130 and "stopped" not in outcome.output):  # no run directory was held
        assert fault.place in (ANY_MOMENT, "pathlib:Path.unlink"), outcome
        return True
    assert outcome.code == 128 + number, outcome
    assert re.search("the same command (resumes|starts again)", outcome.output), outcome
    if fault.place == STEP and not fault.twice:
        said = re.search(r"stopped in level (\d) after step (\d+), saved in (runs/\S+);", outcome.output)
        assert said, outcome
        facts = read_facts(folder / said[3] / "checkpoint.safetensors")
        assert [facts["level"], facts["step"]] == [int(said[1]), int(said[2])]
    return True


def disturb(campaign: Campaign, wanted: list[tuple[str, str]], variants: list[tuple[str, str]], rng: random.Random) -> None:
    """Disturb runs, some more than once, until each wanted fault has struck; compare each rerun with the undisturbed run."""
    for variant in itertools.cycle(variants):
        if not wanted:
            break
        alone, expected = campaign.undisturbed(variant)
        folder, faults = campaign.folder(), []
        for _ in range(rng.choice([1, 1, 2, 3])):
            if not wanted or not alone.calls.get(wanted[0][1], True):
                break  # this variant never comes to that place
            faults.append(draw(rng, *wanted[0], alone))
            if not check_outcome(faults[-1], campaign.run(folder, variant, faults[-1]), folder):
                break  # the run ended before that moment: another run takes the fault
            wanted.pop(0)
        again = campaign.run(folder, variant)
        assert again.code == 0, (variant, faults, again.output)
        assert contents(folder / "runs") == expected, (variant, faults)
        shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["signals", "disk errors"])
@pytest.mark.parametrize("variants", [VARIANTS[:1], pytest.param(VARIANTS, marks=pytest.mark.faults)], ids=["sample", "campaign"])
def test_disturbed_runs_end_bit_identical(campaign, figures, what, variants):
    began, rng = time.monotonic(), random.Random(57)
    count = 4 if len(variants) == 1 else {"signals": 100, "disk errors": 200}[what]
    names, places = (SIGNALS, [*PLACES, ANY_MOMENT]) if what == "signals" else (ERRORS, FILE_SYSTEM)
    reached = {place for variant in variants for place, calls in campaign.undisturbed(variant)[0].calls.items() if calls}
    pairs = list(itertools.product(names, [place for place in places if place in reached | {ANY_MOMENT}]))
    rng.shuffle(pairs)
    disturb(campaign, list(itertools.islice(itertools.cycle(pairs), count)), variants, rng)
    figures.append(f"{what} survived: {count}, {time.monotonic() - began:.0f} s")


# ---- two processes ----


@pytest.mark.faults
def test_two_starts_never_both_train(campaign, commands, figures):
    """Some milliseconds apart; in every second race one of them is killed in its training, if it gets there."""
    began, rng, codes = time.monotonic(), random.Random(1), Counter()
    words = [*commands["lt_glue.py"], *["--max-steps", "4", "--levels", "2", "--save-steps", "1", "--output-dir", "../runs"]]
    alone = campaign.folder()
    assert campaign.harness.run(alone / "a", "lt_glue.py", words).code == 0
    for number in range(50):
        place, waits = campaign.folder(), [0.0, rng.uniform(0, 0.02)]
        rng.shuffle(waits)
        fault = Fault("SIGKILL", STEP, rng.randint(1, 8)) if number % 2 else None
        tasks = zip("ab", (fault, None), waits, strict=True)
        jobs = [Job(place / name, "lt_glue.py", words, fault, wait=wait) for name, fault, wait in tasks]
        first, second = campaign.harness.run_together(jobs)
        check_race(place, first, second)
        codes[str(first.code), str(second.code)] += 1
        assert campaign.harness.run(place / "a", "lt_glue.py", words).code == 0
        assert contents(place / "runs") == contents(alone / "runs")
        shutil.rmtree(place)
    assert sum(count for pair, count in codes.items() if "75" in pair) >= 40
    figures.append(f"two starts of one run: 50 times, {time.monotonic() - began:.0f} s; exit codes: {dict(codes)}")


def check_race(place: Path, first: Outcome, second: Outcome) -> None:
    """One process trained; the other was told of it, or came when it was through or killed."""
    for outcome, holder in ((first, second), (second, first)):
        assert "Traceback" not in outcome.output, outcome
        assert outcome.code in (0, 75, -9), outcome
        if outcome.code == 75:
            assert holder.code != 75, (first, second)
            assert re.search(rf"in use by (process {holder.pid} on \S+|another process); wait for it", outcome.output), outcome
    (run,) = (place / "runs").iterdir()
    log = Counter((event["event"], event.get("level")) for event in events(run / "log.jsonl"))
    assert log["start", None] == 1, log
    assert log["resume", None] <= (first.code == -9), log
    assert all(count == 1 for (event, _), count in log.items() if event == "level"), log
