"""Nothing lost, nothing silently wrong: runs that are killed at any moment, and files that are damaged in any way.

`-m faults` is the campaign: a hundred signals, and every file damaged in every way. A sample of it is run with the other tests.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from campaign import VARIANTS, Bench, Variant, contents, table
from victims import ANY_MOMENT, PLACES, End, Strike

from bert_tickets.files import read_facts
from bert_tickets.runs.verify import main

SEED = 57
SIGNALS = {signal.SIGKILL: "SIGKILL", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


# ---- kills ----


def draw(rng: random.Random, number: signal.Signals, where: str, end: End) -> Strike:
    """A moment of this kind in a run that ends as `end` when it is left alone."""
    twice = number != signal.SIGKILL and rng.random() < 0.3
    if where == ANY_MOMENT:
        return Strike(number, twice=False, after=rng.uniform(0, end.seconds))
    places = [place for place, kind in PLACES.items() if kind == where and end.calls[place]]
    place = rng.choice(places)
    return Strike(number, place, rng.randint(1, end.calls[place]), rng.random() < 0.5, twice)


def check_end(strike: Strike, end: End, folder: Path) -> bool:
    """Whether a signal struck the run, which then must have ended as it should."""
    assert "Traceback" not in end.said
    if strike.number == signal.SIGKILL:
        assert end.code in (0, -signal.SIGKILL), end
        return end.code != 0
    if end.code == 0:  # its last level was trained already, or the signal came too late
        return "stopping after this step" in end.said
    if end.code == -strike.number or "interrupted" in end.said:  # no run directory was held: nothing to save
        assert strike.place in (ANY_MOMENT, "pathlib:Path.unlink"), end
        return True
    assert end.code == 128 + strike.number, end
    assert "the same command goes on from there" in end.said, end
    if PLACES.get(strike.place) in ("step", "checkpoint") and not strike.twice:
        told = re.search(r"stopped in level (\d) after step (\d+), saved in (runs/\S+);", end.said)
        assert told, end
        facts = read_facts(folder / told[3] / "checkpoint.safetensors")
        assert [facts["level"], facts["step"]] == [int(told[1]), int(told[2])]
    return True


def disturb(bench: Bench, rng: random.Random, wanted: list[tuple[signal.Signals, str]]) -> Counter[tuple[str, str]]:
    """Strike runs, some of them more than once, until each wanted signal has struck where it was to; hold every one that is
    then left alone against the undisturbed run."""
    struck: Counter[tuple[str, str]] = Counter()
    for variant in itertools.cycle(rng.sample(VARIANTS, len(VARIANTS))):
        if not wanted:
            return struck
        alone, expected = bench.undisturbed(variant)
        folder, strikes = bench.folder(), []
        for _ in range(rng.choice([1, 1, 2, 3])):
            if not wanted:
                break
            number, where = wanted[0]
            strikes.append(draw(rng, number, where, alone))
            if not check_end(strikes[-1], bench.run(folder, variant, strikes[-1]), folder):
                break  # the run was through before its moment came: another one takes it
            struck[SIGNALS[number], where] += 1
            wanted.pop(0)
        end = bench.run(folder, variant)
        assert end.code == 0, (variant, strikes, end.said)
        assert contents(folder) == expected, (variant, strikes)
        shutil.rmtree(folder)
    raise AssertionError("an endless cycle ended")


def moments(rng: random.Random, count: int) -> list[tuple[signal.Signals, str]]:
    """So many signals and kinds of moments, each pair as often as the others."""
    pairs = list(itertools.product(SIGNALS, dict.fromkeys([*PLACES.values(), ANY_MOMENT])))
    rng.shuffle(pairs)
    return list(itertools.islice(itertools.cycle(pairs), count))


def test_runs_that_are_killed_at_some_moments_end_bit_identical(bench):
    rng = random.Random(SEED)
    struck = disturb(bench, rng, moments(rng, 6))
    assert sum(struck.values()) == 6


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_a_hundred_kills(bench, seed, figures):
    began, rng = time.monotonic(), random.Random(seed)
    struck = disturb(bench, rng, moments(rng, 100))
    assert sum(struck.values()) == 100
    figures.append(f"kills survived, by signal and place (seed {seed}): 100 of 100, {time.monotonic() - began:.0f} s")
    figures.extend(table(struck, list(SIGNALS.values()), "place"))


# ---- damaged files ----

KINDS = ("truncated", "bit-flipped", "emptied", "of another kind", "of another run", "removed")
RECOVERED = {"checkpoint.safetensors", "results.jsonl", "log.jsonl", "lock"}  # what a run can do without


def damage(path: Path, kind: str, other: Path, rng: random.Random) -> None:
    """Spoil a file; `other` is the same one of another run."""
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: rng.randrange(1, len(data))])
    elif kind == "bit-flipped":
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


def check_rerun(end: End, name: str, kind: str, folder: Path, before: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """The outcome of a run over a damaged file: it came to the undisturbed bytes, or was refused in words."""
    assert "Traceback" not in end.said, end.said
    file = name.split("/")[-1]
    if end.code == 0:
        if kind == "removed" and len(before) < len(expected) and contents(folder) == before:
            assert f"{name} is missing: " in end.said  # of a finished run: its table does without
            return "said"
        assert contents(folder) == expected
        if file == "checkpoint.safetensors" and kind != "removed":
            assert re.search(r"checkpoint\.safetensors is damaged.*begins again", end.said), end.said
        return "recovered"
    assert end.code == 2, end
    assert file not in RECOVERED, end.said
    assert re.search(rf"^error: \S*{re.escape(name)} (is|has) .*put back a copy", end.said, re.MULTILINE), end
    assert contents(folder) == before
    return "refused"


def check_inspect(run: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect` names the file, unless nobody can know that it was there, or what was in it."""
    with pytest.raises(SystemExit) as end:
        main(type("Args", (), {"runs": [str(run)]}))
    said = capsys.readouterr().out
    assert end.value.code == 1, (name, kind, said)
    assert name.split("/")[-1] in said, (name, kind, said)


def spoil(bench: Bench, capsys, variant: Variant, *, finished: bool, rng: random.Random, only=lambda name, kind: True):
    """Damage each file of a run in each way, one at a time, and give the command again."""
    _, expected = bench.undisturbed(variant)
    source, others = (bench.source((variant[0], variant[1] + seed), finished=finished) for seed in ("", " --seed 58"))
    (run,), (other,) = ((place / "runs").iterdir() for place in (source, others))
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    for name, kind in itertools.product(names, KINDS):
        if not only(name, kind) or (name == "lock" and kind != "of another kind"):  # a lock is empty of meaning, and of bytes
            continue
        folder = Path(shutil.copytree(source, bench.folder()))
        spoilt = folder / "runs" / run.name
        damage(spoilt / name, kind, other / name, rng)
        changed = not (spoilt / name).exists() or (spoilt / name).read_bytes() != (run / name).read_bytes()
        if changed and name not in ("lock", "log.jsonl") and (name, kind) != ("checkpoint.safetensors", "removed"):
            check_inspect(spoilt, name, kind, capsys)
        if "model" in Path(name).parts:  # no run reads it; two runs' configurations are one
            if changed:
                yield name, kind, "named"
            shutil.rmtree(folder)
            continue
        before = contents(folder)
        yield name, kind, check_rerun(bench.run(folder, variant), name, kind, folder, before, expected)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "kind", "outcome"),
    [
        ("level_01/weights.safetensors", "of another run", "refused"),
        ("level_00/mask.safetensors", "removed", "refused"),
        ("run.json", "removed", "refused"),
        ("checkpoint.safetensors", "of another run", "recovered"),
        ("results.jsonl", "bit-flipped", "recovered"),
        ("log.jsonl", "of another kind", "recovered"),
    ],
)
def test_a_damaged_file_is_done_without_or_named_and_refused(bench, capsys, name, kind, outcome):
    rng = random.Random(SEED)
    found = spoil(bench, capsys, ("lt_glue.py", ""), finished=False, rng=rng, only=lambda *which: which == (name, kind))
    assert list(found) == [(name, kind, outcome)]


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_every_file_damaged_in_every_way(bench, capsys, seed, figures):
    began, rng = time.monotonic(), random.Random(seed)
    tried: Counter[tuple[str, str]] = Counter()
    for variant, finished in itertools.product([*VARIANTS[:4], VARIANTS[5], VARIANTS[7]], [False, True]):
        for name, kind, outcome in spoil(bench, capsys, variant, finished=finished, rng=rng):
            tried[outcome, Path(name).name] += 1
            tried[kind, Path(name).name] += 1
    count = sum(times for (what, _), times in tried.items() if what in KINDS)
    figures.append(f"files damaged, and the command given again (seed {seed}): {count} times, {time.monotonic() - began:.0f} s")
    figures.extend(table(tried, [*KINDS, "recovered", "refused", "said", "named"], "file"))


def test_a_kept_model_is_the_same_whether_its_tokens_came_from_the_cache(bench):
    """A tokenizer remembers what it was last asked for, and is saved with it."""
    folder, variant = bench.folder(), ("lt_glue.py", "--keep-models --max-steps 1 --levels 1")
    assert bench.run(folder, variant).code == 0
    cold = contents(folder)
    shutil.rmtree(folder / "runs")
    assert bench.run(folder, variant).code == 0
    assert contents(folder) == cold
    assert any(name.endswith("tokenizer.json") for name in cold)
