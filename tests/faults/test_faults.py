"""Nothing is lost, and nothing silently wrong: runs that meet a signal or a disk error at any moment, and damaged files.

`-m faults` is the campaign: a hundred kills, hundreds of disk errors, every file damaged in every way. The default run takes a
sample of it.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from campaign import VARIANTS, Campaign, Variant, run_of, table
from crash_harness import ANY_MOMENT, FILE_SYSTEM, PLACES, STEP, Fault, Harness, Outcome
from trainrun import contents

from bert_tickets.files import read_facts
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import events
from bert_tickets.runs.integrity import problems

SIGNALS = ["SIGKILL", "SIGTERM", "SIGINT"]
ERRORS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"]


@pytest.fixture(scope="module")
def campaign(harness, commands, tmp_path_factory):
    return Campaign(harness, commands, tmp_path_factory.mktemp("faults"))


# ---- signals and disk errors ----


def draw(rng: random.Random, name: str, where: str, alone: Outcome) -> Fault:
    """A fault of this kind, at a moment of a run that ends as `alone` when it is undisturbed."""
    if where == ANY_MOMENT:
        return Fault(name, after=rng.uniform(0, alone.seconds))
    known = PLACES if name in SIGNALS else FILE_SYSTEM
    place = rng.choice([place for place, kind in known.items() if kind == where and alone.calls[place]])
    twice = name in ("SIGTERM", "SIGINT") and rng.random() < 0.3
    return Fault(name, place, rng.randint(1, alone.calls[place]), name not in SIGNALS or rng.random() < 0.5, twice)


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
    assert "the same command resumes" in outcome.output, outcome
    if fault.place == STEP and not fault.twice:
        said = re.search(r"stopped in level (\d) after step (\d+), saved in (runs/\S+);", outcome.output)
        assert said, outcome
        facts = read_facts(folder / said[3] / "checkpoint.safetensors")
        assert [facts["level"], facts["step"]] == [int(said[1]), int(said[2])]
    return True


def disturb(
    campaign: Campaign, rng: random.Random, wanted: list[tuple[str, str]], variants: list[Variant]
) -> Counter[tuple[str, str]]:
    """Disturb runs, some more than once, until each wanted fault has struck; compare each rerun with the undisturbed run."""
    struck: Counter[tuple[str, str]] = Counter()
    for variant in itertools.cycle(rng.sample(variants, len(variants))):
        if not wanted:
            break
        alone, _ = campaign.undisturbed(variant)
        folder, faults = campaign.folder(), []
        for _ in range(rng.choice([1, 1, 2, 3])):
            if not wanted:
                break
            faults.append(draw(rng, *wanted[0], alone))
            if not check_outcome(faults[-1], campaign.run(folder, variant, faults[-1]), folder):
                break  # the run ended before that moment: another run takes the fault
            struck[wanted.pop(0)] += 1
        campaign.check_rerun(folder, variant, faults)
    return struck


def moments(rng: random.Random, names: list[str], places: dict[str, str], count: int) -> list[tuple[str, str]]:
    """So many faults and kinds of places, each pair as often as the others."""
    pairs = list(itertools.product(names, dict.fromkeys([*places.values(), *[ANY_MOMENT] * (names == SIGNALS)])))
    rng.shuffle(pairs)
    return list(itertools.islice(itertools.cycle(pairs), count))


@pytest.mark.parametrize(("names", "places"), [(SIGNALS, PLACES), (ERRORS, FILE_SYSTEM)], ids=["signals", "errors"])
def test_disturbed_runs_end_bit_identical(campaign, names, places):
    rng = random.Random(57)
    assert disturb(campaign, rng, moments(rng, names, places, 4), VARIANTS[:1]).total() == 4


@pytest.mark.faults
@pytest.mark.parametrize(
    ("names", "places", "count"), [(SIGNALS, PLACES, 100), (ERRORS, FILE_SYSTEM, 200)], ids=["signals", "errors"]
)
def test_hundreds_of_disturbed_runs_end_bit_identical(campaign, figures, names, places, count):
    began, rng = time.monotonic(), random.Random(1)
    struck = disturb(campaign, rng, moments(rng, names, places, count), VARIANTS)
    assert struck.total() == count
    figures.append(f"{'signals' if names == SIGNALS else 'disk errors'} survived: {count}, {time.monotonic() - began:.0f} s")
    figures.extend(table(struck, names, "place"))


# ---- two processes ----


@pytest.mark.faults
def test_two_starts_never_both_train(campaign, commands, figures):
    """Some milliseconds apart; in every second race one of them is killed in its training, if it gets there."""
    began, rng, codes = time.monotonic(), random.Random(1), Counter()
    words = [*commands["lt_glue.py"], *["--max-steps", "4", "--levels", "2", "--save-steps", "1", "--output-dir", "../runs"]]
    with Harness() as other, ThreadPoolExecutor(2) as pool:

        def run(harness: Harness, folder: Path, wait: float, fault: Fault | None) -> Outcome:
            time.sleep(wait)
            return harness.run(folder, "lt_glue.py", words, fault)

        alone = campaign.folder()
        assert run(campaign.harness, alone / "a", 0, None).code == 0
        for number in range(50):
            place, waits = campaign.folder(), [0.0, rng.uniform(0, 0.02)]
            rng.shuffle(waits)
            fault = Fault("SIGKILL", STEP, rng.randint(1, 8)) if number % 2 else None
            tasks = zip((campaign.harness, other), (place / "a", place / "b"), waits, (fault, None), strict=True)
            first, second = pool.map(lambda task: run(*task), tasks)
            check_race(place, first, second)
            codes[str(first.code), str(second.code)] += 1
            assert run(campaign.harness, place / "a", 0, None).code == 0
            assert contents(place / "runs") == contents(alone / "runs")
            shutil.rmtree(place)
    assert sum(count for pair, count in codes.items() if "75" in pair) >= 40
    figures.append(f"two starts of one run: 50 times, {time.monotonic() - began:.0f} s; exit codes of the two:")
    figures.extend(f"  {one:>4} {two:>4}: {count:3}" for (one, two), count in sorted(codes.items()))


def check_race(place: Path, first: Outcome, second: Outcome) -> None:
    """One process trained; the other was told of it, or came when it was through or killed."""
    for outcome, holder in ((first, second), (second, first)):
        assert "Traceback" not in outcome.output, outcome
        assert outcome.code in (0, 75, -9), outcome
        if outcome.code == 75:
            assert holder.code != 75, (first, second)
            assert re.search(rf"in use by (process {holder.pid} on \S+|another process); wait for it", outcome.output), outcome
    log = Counter((event["event"], event.get("level")) for event in events(run_of(place) / "log.jsonl"))
    assert log["start", None] == 1, log
    assert log["resume", None] <= (first.code == -9), log
    assert all(count == 1 for (event, _), count in log.items() if event == "level"), log


# ---- damaged files ----

DAMAGES = ("truncated", "bit-flipped", "emptied", "of another kind", "of another run", "removed")
DISPENSABLE = {"checkpoint.safetensors", "results.jsonl", "log.jsonl", "train.jsonl", "lock", "lock.holder"}
UNCHECKED = {"log.jsonl", "train.jsonl", "lock", "lock.holder"}


def damage(path: Path, kind: str, other: Path, rng: random.Random) -> None:
    """Damage a file; `other` is the same one of another run."""
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: rng.randrange(len(data) or 1)])
    elif kind == "bit-flipped":
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "of another kind":
        path.write_bytes(rng.choice([b"PK\x03\x04", b"{}", b"[[[", b"\xff\xfe\x00", b"a text\n"]) * rng.randint(1, 99))
    elif kind == "of another run":
        shutil.copy(other, path)
    else:
        path.unlink()


def check_rerun(campaign: Campaign, variant: Variant, finished: bool, name: str, folder: Path) -> str:
    """Give the command again over a damaged file: it recovers to the undisturbed bytes, or refuses and names the file.

    A run reads no kept model, and a finished one only run.json, metrics, and the masks' metadata: then it leaves the file.
    """
    before, expected = contents(folder / "runs"), campaign.undisturbed(variant)[1]
    outcome, file = campaign.run(folder, variant), Path(name).name
    assert "Traceback" not in outcome.output, outcome.output
    if outcome.code == 0:
        found = contents(folder / "runs")
        if found == expected:
            return "recovered"
        damaged = f"{run_of(folder).name}/{name}"
        assert found.pop(damaged, None) == before.pop(damaged, None)
        assert found == {path: data for path, data in expected.items() if path != damaged}
        assert (finished and file.endswith(".safetensors")) or "model" in Path(name).parts, (name, outcome.output)
        return "not read"
    assert outcome.code == 2, outcome
    assert file not in DISPENSABLE, outcome.output
    assert re.search(rf"^error: .*{re.escape(name)}.*restore a copy", outcome.output, re.MULTILINE), outcome.output
    assert contents(folder / "runs") == before
    return "refused"


def damaged(campaign: Campaign, variant: Variant, finished: bool, rng: random.Random, only: set[tuple[str, str]] | None = None):
    """Damage each file of a run in each way, one at a time, and give the command again: (file, damage, outcome)."""
    source, other = (campaign.source((variant[0], variant[1] + more), finished=finished) for more in ("", " --seed 58"))
    run, other = run_of(source), run_of(other)
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    for name, kind in itertools.product(names, DAMAGES):
        if only is not None and (name, kind) not in only:
            continue
        if kind == "of another run" and name.endswith("mask.safetensors") and Mask.load(run / name) == Mask.load(other / name):
            continue  # an equal mask is not damage
        folder = Path(shutil.copytree(source, campaign.folder()))
        path = run_of(folder) / name
        damage(path, kind, other / name, rng)
        changed = not path.exists() or path.read_bytes() != (run / name).read_bytes()
        found = list(problems(run_of(folder)))
        if not changed or name in UNCHECKED:
            assert found == [], (name, kind, found)
        elif (name, kind) != ("checkpoint.safetensors", "removed"):
            named = any(Path(name).name in problem for problem in found)
            assert named or (found and name == "run.json"), (name, kind, found)  # then the other files are another run's
        if changed:
            yield name, kind, check_rerun(campaign, variant, finished, name, folder)
        shutil.rmtree(folder)


SAMPLE = {
    ("level_01/weights.safetensors", "of another run"): "refused",
    ("level_00/mask.safetensors", "removed"): "refused",
    ("run.json", "removed"): "refused",
    ("checkpoint.safetensors", "of another run"): "recovered",
    ("results.jsonl", "bit-flipped"): "recovered",
    ("log.jsonl", "of another kind"): "recovered",
}


def test_damaged_files_are_recovered_or_refused(campaign):
    found = damaged(campaign, ("lt_glue.py", ""), False, random.Random(57), set(SAMPLE))
    assert {(name, kind): outcome for name, kind, outcome in found} == SAMPLE


@pytest.mark.faults
def test_every_file_damaged_in_every_way(campaign, figures):
    began, rng, counts, total = time.monotonic(), random.Random(1), Counter(), 0
    for variant, finished in itertools.product([*VARIANTS[:4], VARIANTS[5], VARIANTS[7]], [False, True]):
        for name, kind, outcome in damaged(campaign, variant, finished, rng):
            total += 1
            counts[outcome, Path(name).name] += 1
            counts[kind, Path(name).name] += 1
    assert total > 300
    figures.append(f"files damaged, and the command given again: {total} times, {time.monotonic() - began:.0f} s")
    figures.extend(table(counts, [*DAMAGES, "recovered", "refused", "not read"], "file"))
