"""A damaged file of a run is named by verify.py, and the same command recovers its run to the bit, or refuses and names it.

`-m faults` damages every file of many runs in every way; the default run takes a sample of it.
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
from trainrun import THREE_LEVELS, Killed, Runs, contents, dying

from bert_tickets.errors import Damaged
from bert_tickets.masking.mask import Mask
from bert_tickets.runs import session
from bert_tickets.runs.integrity import problems

DAMAGES = ("truncated", "bit-flipped", "emptied", "of another kind", "of another run", "removed")
UNCHECKED = {"log.jsonl", "train.jsonl", "lock"}
DISPENSABLE = {"checkpoint.safetensors", "results.jsonl", *UNCHECKED}
VARIANTS = [("lt_glue.py", words) for words in ("", "--rewind 3", "--rewind none", "--keep-models")]
VARIANTS += [("lt_squad.py", ""), ("lt_pretrain.py", "")]
SEARCHES = [("lt_glue.py", "--method early-bird --draw-at 5")]
# Of each run, every so many of the pairs of a file and a damage.
SAMPLE = [pytest.param("lt_glue.py", "--rewind 3 --keep-models", False, 5, id="sample")]
SAMPLE += [pytest.param(*SEARCHES[0], False, 4, id="search")]
CAMPAIGN = [
    pytest.param(script, words, finished, 1, id=f"{script}{words}-{finished}", marks=pytest.mark.faults)
    for (script, words), finished in itertools.product([*VARIANTS, *SEARCHES], [False, True])
]


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


@pytest.mark.parametrize(("script", "words", "finished", "stride"), [*SAMPLE, *CAMPAIGN])
def test_a_damaged_file_is_recovered_or_refused(commands, tmp_path, monkeypatch, figures, script, words, finished, stride):
    levels = ["--save-steps", "2"] if (script, words) in SEARCHES else THREE_LEVELS
    runs = Runs(script, [*commands[script], *levels], tmp_path, monkeypatch)
    rng, began, counts, more = random.Random(1), time.monotonic(), Counter(), words.split()
    expected = runs("undisturbed", *more)
    for name, seed in (("source", "57"), ("other", "58")):
        with monkeypatch.context() as patch:
            if not finished:  # killed in the evaluation of the last level
                patch.setattr(session, "evaluate", dying(session.evaluate, 2 if (script, words) in SEARCHES else 3))
            try:
                runs(name, *more, "--seed", seed)
            except Killed:
                assert not finished
    source, other = runs.dir("source"), runs.dir("other")
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    for name, kind in list(itertools.product(names, DAMAGES))[::stride]:
        if kind == "of another run" and name.endswith("mask.safetensors") and Mask.load(source / name) == Mask.load(other / name):
            continue  # an equal mask is not damage
        shutil.copytree(runs.place / "source", runs.place / "damaged")
        run = runs.dir("damaged")
        damage(run / name, kind, other / name, rng)
        if (run / name).exists() and (run / name).read_bytes() == (source / name).read_bytes():
            assert problems(run) == []
        else:
            check_problems(run, name, kind)
            counts[check_rerun(runs, more, name, finished, expected)] += 1
        shutil.rmtree(runs.place / "damaged")
    assert counts.keys() >= {"refused", "recovered"}
    figures.append(f"{script} {words}, {'finished' if finished else 'killed'}: {dict(counts)}, {time.monotonic() - began:.0f} s")


def check_problems(run: Path, name: str, kind: str) -> None:
    """The file is named among the run's problems, if it is one that is verified."""
    found = problems(run)
    if name in UNCHECKED:
        assert found == []
    elif (name, kind) == ("run.json", "of another run"):
        assert found  # the other files are another run's
    elif (name, kind) != ("checkpoint.safetensors", "removed"):
        assert any(Path(name).name in problem for problem in found), (name, kind, found)


def check_rerun(runs: Runs, words: list[str], name: str, finished: bool, expected: dict[str, bytes]) -> str:
    """Give the command again over a damaged file: the run ends with the undisturbed bytes, or is refused and left as it is.

    A run reads no kept model and no record of a finished search, and a finished run only run.json, metrics, and the masks'
    metadata: then it leaves the file.
    """
    before, error = contents(runs.dir("damaged")), None
    try:
        found = runs("damaged", *words)
    except Damaged as refusal:
        found, error = contents(runs.dir("damaged")), str(refusal)
    if error is not None:
        assert re.search(rf"{re.escape(name)}.*restore a copy", error) or name == "run.json", error
        assert name not in DISPENSABLE
        assert found == before
        return "refused"
    if found == expected:
        return "recovered"
    assert found.pop(name, None) == before.pop(name, None)
    assert found == {path: data for path, data in expected.items() if path != name}
    assert (finished and name.endswith(".safetensors")) or "model" in Path(name).parts or name.endswith("coefficients.npy")
    return "not read"
