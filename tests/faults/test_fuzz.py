"""Files from anywhere: a reader gives a right result or one line, soon.

`-m faults` feeds each reader ten thousand inputs; the default run fifty.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from trainrun import train

from bert_tickets.config import from_flat
from bert_tickets.data.glue_files import ROWS, read_tsv
from bert_tickets.data.squad_files import read_json as read_squad
from bert_tickets.errors import UserError
from bert_tickets.files import write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import read_run, results_lines
from bert_tickets.runs.integrity import problems
from bert_tickets.runs.summary import print_finished

SEED = 57
SOON = 5000  # milliseconds; an input takes a few
TIMES = [pytest.param(50, id="50"), pytest.param(10_000, id="10000", marks=pytest.mark.faults)]

# ---- inputs ----

Edit = tuple[int, int, bytes | None]  # place, length, and the new bytes; None: those of another file
EDITS = st.lists(
    st.tuples(
        st.integers(0, 2**20),
        st.integers(0, 200) | st.sampled_from([1, 2**20]),
        st.binary(max_size=12) | st.binary(min_size=1, max_size=1) | st.none(),
    ),
    max_size=4,
)
NONSENSE = st.one_of(
    st.sampled_from([None, True, -1, 1.5, 2**64, 10**400, float("inf"), float("nan"), "x" * 3000, [], {}, [None], {"": None}]),
    st.integers(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
CHANGES = st.lists(st.tuples(st.integers(0, 2**20), NONSENSE), min_size=1, max_size=3)


def edit(data: bytes, edits: list[Edit], other: bytes) -> bytes:
    """Valid bytes with parts replaced, cut out or inserted, some by parts of another valid file."""
    found = bytearray(data)
    for place, length, new in edits:
        at, start = place % (len(found) + 1), place % (len(other) + 1)
        found[at : at + length] = other[start : start + length] if new is None else new
    return bytes(found)


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from nodes(value[key])


def replaced(value: Any, changes: list[tuple[int, Any]]) -> Any:
    """A JSON value with some of its nodes replaced, or removed."""
    value = json.loads(json.dumps(value))
    for number, new in changes:
        places = list(nodes(value))
        if not places:
            return new
        container, key = places[number % len(places)]
        if number % 5 == 0:
            del container[key]
        else:
            container[key] = json.loads(json.dumps(new))
    return value


# ---- the fuzzer ----


@pytest.fixture
def fuzz(figures: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that feeds a reader so many inputs. The reader may raise `UserError` or `OSError`, and nothing else."""

    def run(reader: str, inputs: st.SearchStrategy, read: Callable[[Any], None], examples: int) -> None:
        counts, began = {"read": 0, "refused": 0}, time.monotonic()

        @seed(SEED)
        @settings(
            max_examples=examples,
            database=None,
            deadline=SOON,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def feed(content: Any) -> None:
            try:
                read(content)
                counts["read"] += 1
            except (UserError, OSError):
                counts["refused"] += 1

        monkeypatch.setattr("sys.stdout", StringIO())
        feed()
        assert counts["refused"] > 0
        if examples > 50:
            done = f"{counts['read']:,} read, {counts['refused']:,} refused, 0 failures"
            figures.append(f"{reader}: {sum(counts.values()):,} inputs: {done}, {time.monotonic() - began:.0f} s")

    return run


# ---- the readers ----

MASK = Mask({"a.weight": torch.arange(60).view(6, 10) % 3 == 0, "b.bias": torch.arange(5) > 2}, {"method": "imp", "seed": "7"})


def released(**options: object) -> bytes:
    """A mask.pt of the released code."""
    buffer = BytesIO()
    torch.save({f"{name}_mask": kept.float() for name, kept in MASK.items()}, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("examples", TIMES)
def test_masks(tmp_path, examples, fuzz):
    path = tmp_path / "mask"
    MASK.write(path)
    ours, kinds = path.read_bytes(), [path.read_bytes(), released(), released(_use_new_zipfile_serialization=False)]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        mask = Mask.load(path)
        assert 0 <= mask.density <= 1
        if data.startswith(ours[:8]):
            assert mask == MASK  # a file with a checksum is as it was written, or is refused

    edited = st.builds(edit, st.sampled_from(kinds), EDITS, st.sampled_from(kinds))
    fuzz("masks", st.one_of(edited, st.binary(max_size=200)), read, examples)


CELLS = st.sampled_from(["0", "1", "5", "-1", "nan", "entailment", "", " ", '"', "\0", "é", "\ufeff"]) | st.text(max_size=6)


@pytest.mark.parametrize("examples", TIMES)
def test_tsv_files(glue_dir, tmp_path, examples, fuzz):
    tasks = st.sampled_from(["cola", "stsb", "mnli", "sst2"])
    files = {task: (glue_dir / row.folder / "train.tsv").read_bytes() for task, row in ROWS.items()}
    path = tmp_path / "train.tsv"

    def join(task: str, lines: list[list[str]]) -> tuple[str, bytes]:
        text = "\n".join("\t".join(line) for line in lines)
        return task, files[task] + text.encode("utf-8", "surrogatepass")

    def read(given: Any) -> None:
        task, data = given
        row = ROWS[task]
        path.write_bytes(data)
        for texts, label in read_tsv(path, row):
            assert len(texts) == len(row.texts)
            assert label in range(len(row.labels)) if row.labels else 0 <= label <= 5
            assert all(text == text.strip() for text in texts)

    edited = st.builds(lambda task, edits, other: (task, edit(files[task], edits, files[other])), tasks, EDITS, tasks)
    written = st.builds(join, tasks, st.lists(st.lists(CELLS, max_size=13), max_size=5))
    fuzz("GLUE .tsv", st.one_of(edited, written), read, examples)


@pytest.mark.parametrize("examples", TIMES)
def test_squad_files(squad_dir, tmp_path, examples, fuzz):
    data = (squad_dir / "dev-v1.1.json").read_bytes()
    value = json.loads(data)
    value["data"] = [{"title": "A", "paragraphs": value["data"][0]["paragraphs"][:2]}]
    small, path = json.dumps(value).encode(), tmp_path / "dev-v1.1.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        questions = read_squad(path)
        assert len({question.id for question in questions}) == len(questions) > 0
        assert all(question.answers for question in questions)

    edited = st.builds(edit, st.just(small), EDITS, st.just(data))
    changed = st.builds(lambda changes: json.dumps(replaced(value, changes)).encode(), CHANGES)
    fuzz("SQuAD .json", st.one_of(edited, changed), read, examples)


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory) -> tuple[Path, Any]:
    """A run of two levels, with every kind of file."""
    words = [*commands["lt_glue.py"], "--levels", "2", "--max-steps", "2", "--rewind", "1", "--limit-eval", "4"]
    run = train("lt_glue.py", [*words, "--output-dir", tmp_path_factory.mktemp("fuzzed")])
    cfg = from_flat(read_run(run)["config"])
    write_tensors(run / "checkpoint.safetensors", {"total": torch.zeros(())}, {"run": run.name, "level": 2, "step": 1})
    line = {"run": run.name, "task": cfg.task, "level": 2, "ended": "the loss became nan by step 1"}
    write_checksummed(run / "failure.json", line)
    (run / "results.jsonl").write_bytes(results_lines(run))
    return run, cfg


@pytest.mark.parametrize("examples", TIMES)
def test_run_directories(finished, examples, fuzz):
    """An edited file is a problem, unless it is a log; what reads the directory reads it right, or refuses it."""
    run, cfg = finished
    whole = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != "lock"}
    logs = {path: json.loads(whole[path].splitlines()[-1]) for path in whole if path.name in ("log.jsonl", "train.jsonl")}

    def read(given: tuple[Path, bytes]) -> None:
        path, content = given
        path.write_bytes(content)
        try:
            found = problems(run)
            if content == whole[path] or path in logs:
                assert found == []
            else:
                assert found or path.suffix == ".json"  # an edit of white space is no damage
            if not print_finished(cfg):
                raise UserError(f"{path} is damaged")
        finally:
            path.write_bytes(whole[path])

    files = st.sampled_from(list(whole))
    edited = st.builds(lambda path, edits, other: (path, edit(whole[path], edits, whole[other])), files, EDITS, files)
    lines = st.sampled_from(list(logs)), CHANGES
    logged = st.builds(lambda path, new: (path, whole[path] + json.dumps(replaced(logs[path], new)).encode() + b"\n"), *lines)
    fuzz("run directories", st.one_of(edited, logged), read, examples)


# ---- unpickling ----

UNSAFE = r"^\s*(import|from) (c?pickle|dill|cloudpickle|joblib|marshal|shelve|runpy)\b|allow_pickle=(?!False)|read_pickle"
UNSAFE += r"|trust_remote_code=(?!False)|(?<![\w.])(eval|exec|__import__)\(|torch\.load\((?!.*weights_only=True)"


def test_nothing_is_unpickled_but_weights():
    files = [*(ROOT / "bert_tickets").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if re.search(UNSAFE, line)] == []
    loads = [line for line in lines if "torch.load(" in line]
    assert len(loads) == 2
    assert all("weights_only=True" in line for line in loads)


@pytest.mark.parametrize("line", ["import pickle", "  from joblib import load", "torch.load(path)", "eval(text)"])
def test_a_line_that_unpickles_is_found(line):
    assert re.search(UNSAFE, line)
