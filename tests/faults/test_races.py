"""Two processes on one run directory at the same moment: one trains, and the other says who does."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from campaign import contents
from victims import End, Nursery, Strike

from bert_tickets.runs.directory import events

SETTINGS = ["--max-steps", "4", "--levels", "2", "--save-steps", "1", "--output-dir", "../runs"]


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_two_starts_never_both_train(bench, commands, seed, figures):
    """Some milliseconds apart; in every second race one of them is killed in its training, if it gets there."""
    began, rng, ends = time.monotonic(), random.Random(seed), Counter()
    with Nursery() as other, ThreadPoolExecutor(2) as pool:

        def run(nursery: Nursery, folder: Path, wait: float, strike: Strike | None) -> End:
            time.sleep(wait)
            return nursery.run(folder, "lt_glue.py", [*commands["lt_glue.py"], *SETTINGS], strike)

        alone = bench.folder()
        assert run(bench.nursery, alone / "a", 0, None).code == 0
        expected = contents(alone)
        for number in range(50):
            place, waits = bench.folder(), [0.0, rng.uniform(0, 0.02)]
            rng.shuffle(waits)
            kill = Strike(signal.SIGKILL, "bert_tickets.training.step:Step.__call__", rng.randint(1, 8)) if number % 2 else None
            tasks = zip((bench.nursery, other), (place / "a", place / "b"), waits, (kill, None), strict=True)
            first, second = pool.map(lambda task: run(*task), tasks)
            check_race(place, first, second)
            ends[str(first.code), str(second.code)] += 1
            assert run(bench.nursery, place / "a", 0, None).code == 0
            assert contents(place) == expected
            shutil.rmtree(place)
    assert sum(times for codes, times in ends.items() if "75" in codes) >= 40
    figures.append(f"two starts of one run (seed {seed}): 50 times, {time.monotonic() - began:.0f} s; exit codes of the two:")
    figures.extend(f"  {one:>4} {two:>4}: {times:3}" for (one, two), times in sorted(ends.items()))


def check_race(place: Path, first: End, second: End) -> None:
    """One trained; the other was told of it, or came when it was through, or killed."""
    for end, holder in ((first, second), (second, first)):
        assert "Traceback" not in end.said, end
        assert end.code in (0, 75, -signal.SIGKILL), end
        if end.code == 75:
            assert holder.code != 75, (first, second)
            assert f"is in use by process {holder.process} on {socket.gethostname()}; wait for it, or stop it" in end.said
    (run,) = (place / "runs").iterdir()
    log = Counter((event["event"], event.get("level")) for event in events(run / "log.jsonl"))
    assert log["start", None] == 1, log
    assert log["resume", None] <= (first.code == -signal.SIGKILL), log
    assert all(times == 1 for (event, _), times in log.items() if event == "level"), log
