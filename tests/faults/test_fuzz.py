"""Files from anywhere: a reader gives a right result or a sentence, soon, and in no more memory than the file's size explains.

`-m faults` feeds each reader ten thousand inputs; with the other tests each gets fifty.
"""

from __future__ import annotations

import ast
import copy
import json
import resource
import shutil
import signal
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
import rundirs
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import lt_glue
from bert_tickets import UserError, config
from bert_tickets.cli import parse
from bert_tickets.files import check, read_checksummed, read_facts, read_json, read_tensors, safetensors_parts, write_checksummed
from bert_tickets.masking.mask import Mask
from bert_tickets.report.cells import choose
from bert_tickets.report.results import read_failures, read_records
from bert_tickets.runs.session import directory as history
from bert_tickets.runs.session import summary as report
from bert_tickets.runs.session import tickets as ticket
from bert_tickets.runs.summary import layout, transfers
from bert_tickets.runs.summary import matching as winning
from bert_tickets.runs.summary import rewinding as variations
from bert_tickets.runs.verify import inspect
from bert_tickets.tasks.glue import LONGEST, ROWS, read_tsv
from bert_tickets.tasks.squad import Question
from bert_tickets.tasks.squad import read_json as read_squad

ROOT = Path(__file__).parent.parent
SEED = 57
SOON = 5  # seconds; an input takes milliseconds
ROOM = 2**30  # bytes that one input may take beside what the process has

# ---- inputs ----

Edit = tuple[str, int, int, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "duplicate", "splice", "insert"]),
        st.integers(0, 2**20),
        st.integers(0, 2**20),
        st.binary(max_size=12),
    ),
    max_size=4,
)
NONSENSE = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1.5, -0.0, 2**64, 10**400, float("inf"), float("nan"), "", "x" * 3000, "\ud800"]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"a": {"b": []}}, "../../etc/passwd", "/", "\0", "nan", "level_00"]),
    st.integers(),
    st.text(max_size=5),
)


def edit(data: bytes, edits: list[Edit], other: bytes) -> bytes:
    """Valid bytes, changed: a bit flipped, a part cut out, repeated, or taken from another valid file; bytes inserted."""
    found = bytearray(data)
    for kind, first, second, more in edits:
        at = first % (len(found) + 1)
        length = second % 200
        if kind == "flip" and at < len(found):
            found[at] ^= 1 << second % 8
        elif kind == "cut":
            del found[at : at + (length if second % 2 else len(found))]
        elif kind == "duplicate":
            found[at:at] = found[at : at + length]
        elif kind == "splice":
            start = second % (len(other) + 1)
            found[at : at + length] = other[start : start + length]
        elif kind == "insert":
            found[at:at] = more * (1 + second % 3)
    return bytes(found)


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a value of JSON."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from nodes(value[key])


def replaced(value: Any, changes: list[tuple[int, Any]]) -> Any:
    """A value of JSON with some of its nodes replaced, or gone."""
    value = json.loads(json.dumps(value))
    for number, new in changes:
        places = list(nodes(value))
        if not places:
            return new
        container, key = places[number % len(places)]
        if number % 5 == 0:
            del container[key]
        else:
            container[key] = copy.deepcopy(new)
    return value


CHANGES = st.lists(st.tuples(st.integers(0, 2**20), NONSENSE), min_size=1, max_size=3)


# ---- what is asked of a reader ----


class Count:
    """What became of a reader's inputs."""

    def __init__(self) -> None:
        self.read, self.refused, self.began = 0, 0, time.monotonic()

    def line(self, reader: str) -> str:
        outcomes = f"{self.read:7,} read,{self.refused:7,} refused,  0 failures"
        return f"  {reader:18}{self.read + self.refused:8,} inputs:{outcomes}, {time.monotonic() - self.began:4.0f} s"


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what does not end soon, or takes memory that no input of its size explains."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer in {SOON} seconds")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SOON)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(inputs: st.SearchStrategy[bytes], read: Callable[[bytes], None], examples: int) -> Count:
    """Feed a reader so many inputs; it may raise `UserError` and nothing else."""
    count = Count()

    @seed(SEED)
    @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=ALL)
    @given(inputs)
    def feed(data: bytes) -> None:
        said = ""
        with bounded():
            try:
                read(data)
                count.read += 1
            except UserError as error:
                said = str(error)
                count.refused += 1
        assert len(said) < 2000

    feed()
    return count


ALL = list(HealthCheck)
TIMES = [pytest.param(50, id="50"), pytest.param(10_000, id="10000", marks=pytest.mark.faults)]


@pytest.fixture
def report_count(figures: list[str]) -> Callable[[str, Count], None]:
    def add(reader: str, count: Count) -> None:
        assert count.refused > 0
        if count.read + count.refused > 50:
            if not any("inputs fuzzed" in line for line in figures):
                figures.append(f"inputs fuzzed, by reader (seed {SEED}):")
            figures.append(count.line(reader))

    return add


# ---- masks ----

MASK = Mask({"a.weight": torch.arange(60).view(6, 10) % 3 == 0, "b.bias": torch.arange(5) > 2}, {"method": "imp", "seed": "7"})


def released(**options: object) -> bytes:
    buffer = BytesIO()
    torch.save({f"{name}_mask": kept.float() for name, kept in MASK.items()}, buffer, **options)
    return buffer.getvalue()


def resealed(changes: list[tuple[int, Any]]) -> bytes:
    """A mask file whose metadata are nonsense, under a checksum that says they are right."""
    data = MASK.to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    told = header.pop("__metadata__")
    told["shapes"] = json.loads(told["shapes"])
    told = replaced(told, changes)
    plain = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    parts = {n: torch.frombuffer(bytearray(data[end:]), dtype=torch.uint8)[slice(*e["data_offsets"])] for n, e in header.items()}
    return b"".join(safetensors_parts(parts, {k: v.encode("utf-8", "replace").decode() for k, v in plain.items()}))


def reheaded(changes: list[tuple[int, Any]]) -> bytes:
    """A mask file whose header is nonsense."""
    data = MASK.to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(replaced(json.loads(data[8:end]), changes)).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


@pytest.mark.parametrize("examples", TIMES)
def test_masks(tmp_path, examples, report_count):
    ours, zipped, old = MASK.to_bytes(), released(), released(_use_new_zipfile_serialization=False)
    edited = st.builds(edit, st.sampled_from([ours, zipped, old]), EDITS, st.sampled_from([ours, zipped, old]))
    path = tmp_path / "mask"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        mask = Mask.load(path)
        assert 0 <= mask.density <= 1
        assert mask == Mask.load(path)
        if data.startswith(ours[:8]):
            assert mask == MASK  # what has a checksum is what was written, or is refused

    inputs = st.one_of(edited, st.builds(resealed, CHANGES), st.builds(reheaded, CHANGES), st.binary(max_size=200))
    report_count("masks", fuzz(inputs, read, examples))


# ---- GLUE's tables ----

CELLS = st.sampled_from(["0", "1", "5", "-1", "nan", "entailment", "", " ", '"', "\0", "é", "\ufeff"]) | st.text(max_size=6)


@pytest.mark.parametrize("examples", TIMES)
def test_tsv_files(glue_dir, tmp_path, examples, report_count):
    tasks = ("cola", "stsb", "mnli", "sst2")
    files = {task: (glue_dir / ROWS[task].folder / "train.tsv").read_bytes() for task in tasks}
    path = tmp_path / "train.tsv"

    def join(task: str, lines: list[list[str]]) -> tuple[str, bytes]:
        text = "\n".join("\t".join(line) for line in lines)
        return task, files[task] + text.encode("utf-8", "surrogatepass")

    def change(task: str, edits: list[Edit], other: str) -> tuple[str, bytes]:
        return task, edit(files[task], edits, files[other])

    edited = st.builds(change, st.sampled_from(tasks), EDITS, st.sampled_from(tasks))
    written = st.builds(join, st.sampled_from(tasks), st.lists(st.lists(CELLS, max_size=13), max_size=5))

    def read(given: Any) -> None:
        task, data = given
        row = ROWS[task]
        path.write_bytes(data)
        for texts, label in read_tsv(path, row):
            assert len(texts) == len(row.texts)
            assert label in range(len(row.labels)) if row.labels else 0 <= label <= 5
            assert all(text == text.strip() and "\0" not in text for text in texts)

    report_count("GLUE .tsv", fuzz(st.one_of(edited, written), read, examples))


# ---- SQuAD's files ----


@pytest.mark.parametrize("examples", TIMES)
def test_squad_files(squad_dir, tmp_path, examples, report_count):
    data = (squad_dir / "dev-v1.1.json").read_bytes()
    value = json.loads(data)
    value["data"] = [{"title": "A", "paragraphs": value["data"][0]["paragraphs"][:2]}]
    small, path = json.dumps(value).encode(), tmp_path / "dev-v1.1.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        questions = read_squad(path)
        assert len({question.id for question in questions}) == len(questions) > 0
        for question in questions:
            assert isinstance(question, Question)
            assert question.answers
            if (standing := question.standing) is not None:
                assert question.context[standing[1] :].startswith(standing[0])
            question.context.encode()

    edited = st.builds(edit, st.just(small), EDITS, st.just(data))
    spoilt = st.builds(lambda changes: json.dumps(replaced(value, changes)).encode(), CHANGES)
    report_count("SQuAD .json", fuzz(st.one_of(edited, spoilt), read, examples))


# ---- run directories ----


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory) -> tuple[Path, config.Config]:
    """A run of two levels, with every kind of file."""
    place = tmp_path_factory.mktemp("fuzzed")
    words = [*commands["lt_glue.py"], "--levels", "2", "--max-steps", "2", "--rewind", "1", "--limit-eval", "4"]
    cfg = parse("glue", None, [*words, "--output-dir", str(place)])
    lt_glue.main(cfg)
    run = history.run_dir(cfg, "glue")
    about = {"run": run.name, "level": 2, "step": 1}
    rundirs.write_tensors(run / "checkpoint.safetensors", {"total": torch.zeros(())}, about)
    write_checksummed(
        run / "failure.json", {"run": run.name, "task": cfg.task, "level": 2, "ended": "the loss became nan by step 1"}
    )
    (run / "results.jsonl").write_bytes(history.results_lines(run))
    return run, cfg


def tables_of(run: Path) -> None:
    """All that scripts/tables.py makes of a run."""
    pool = choose(read_records([run]), read_failures([run]))
    made = [winning.table2(pool), winning.table4(pool), winning.curves(pool), transfers.transfer(pool, None)]
    made += [variations.table3(pool, None), variations.weights(pool)]
    tables = [table for table in made if table is not None]
    layout.tidy(tables)
    for write in (layout.markdown, layout.latex):
        write(tables, traced=True)


def read_all(run: Path, cfg: config.Config) -> None:
    """Ask everything that reads run directories; the last of their `UserError`s."""
    readers: list[Callable[[], object]] = [
        lambda: history.seconds(run),
        lambda: history.is_settled(run, 2),
        lambda: history.results(run),
        lambda: report.print_finished(cfg, "glue"),
        lambda: report.print_levels(cfg, "glue"),
        lambda: inspect(run),
        lambda: ticket.find(run),
        lambda: tables_of(run),
    ]
    refusal = None
    for reader in readers:
        try:
            with redirect_stdout(StringIO()):  # as a command's own, which writes what no terminal can as an escape
                reader()
        except UserError as error:
            refusal = error
    if refusal is not None:
        raise refusal


@pytest.mark.parametrize("examples", TIMES)
def test_run_directories(finished, examples, report_count):
    run, cfg = finished
    whole = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    objects = {path: read_checksummed(path) for path in whole if path.suffix == ".json"}
    log = json.loads((run / "log.jsonl").read_text().splitlines()[-1])

    def lines(changes: list[tuple[int, Any]]) -> bytes:
        return whole[run / "log.jsonl"] + json.dumps(replaced(log, changes)).encode() + b"\n"

    edited = st.builds(
        lambda path, edits, other: (path, edit(whole[path], edits, whole[other])),
        st.sampled_from(list(whole)),
        EDITS,
        st.sampled_from(list(whole)),
    )
    spoilt = st.builds(lambda path, changes: (path, replaced(objects[path], changes)), st.sampled_from(list(objects)), CHANGES)
    logged = st.builds(lambda changes: (run / "log.jsonl", lines(changes)), CHANGES)

    def read(given: Any) -> None:
        path, content = given
        try:
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, dict):
                write_checksummed(path, content)
            else:
                path.write_text(json.dumps(content))
            read_all(run, cfg)
        finally:
            path.write_bytes(whole[path])

    report_count("run directories", fuzz(st.one_of(edited, spoilt, logged), read, examples))


# ---- hostile files ----


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zipped(data: bytes) -> bytes:
    """The same archive, its parts compressed."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def shaped(shapes: str) -> bytes:
    """A mask file of one byte that says it has these shapes."""
    told = {"format": "bert_tickets mask 1", "shapes": shapes}
    return b"".join(safetensors_parts({"a": torch.zeros(1, dtype=torch.uint8)}, told))


HOSTILE = {
    "a header of terabytes": lambda: (2**44).to_bytes(8, "little") + b"{}",
    "a header longer than any": lambda: header(b'{"a":' + b" " * 2**26 + b"1}"),
    "a tensor of terabytes": lambda: header(json.dumps({"a": tensor("U8", [2**44], 0, 2**44)}).encode(), bytes(8)),
    "a shape that overflows": lambda: header(json.dumps({"a": tensor("U8", [2**40, 2**40, 0], 0, 0)}).encode()),
    "tensors that overlap": lambda: header(
        json.dumps({"a": tensor("U8", [8], 0, 8), "b": tensor("U8", [8], 4, 12)}).encode(), bytes(12)
    ),
    "a tensor that ends before it begins": lambda: header(json.dumps({"a": tensor("U8", [4], 8, 4)}).encode(), bytes(8)),
    "a dtype that is none": lambda: header(json.dumps({"a": tensor("U7", [8], 0, 8)}).encode(), bytes(8)),
    "a dtype of another size": lambda: header(json.dumps({"a": tensor("F64", [8], 0, 8)}).encode(), bytes(8)),
    "twenty thousand tensors of gigabytes": lambda: header(
        json.dumps({f"t{i}": tensor("U8", [2**30], i, i + 1) for i in range(20_000)}).encode(), bytes(20_000)
    ),
    "a header nested deep": lambda: header(b"[" * 200_000),
    "metadata that are a list": lambda: header(b'{"__metadata__":[]}'),
    "metadata that are null": lambda: header(b'{"__metadata__":null}'),
    "a header of NUL bytes": lambda: header(bytes(4096)),
    "shapes nested deep": lambda: shaped("[" * 10**6),
    "shapes of a million dimensions": lambda: shaped(json.dumps({"a": [1] * 10**6})),
    "an archive that unpacks to a thousand times its size": lambda: zipped(saved({"a_mask": torch.ones(10**7)})),
    "ten thousand views of one storage": lambda: saved(dict.fromkeys(map("{}_mask".format, range(10**4)), torch.ones(10**6))),
    "an archive without end": lambda: released()[:-22] + b"PK\x05\x06" + b"\xff" * 18,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_of_tensors_is_refused_soon_and_in_little_memory(tmp_path, what):
    path = tmp_path / "file.safetensors"
    path.write_bytes(HOSTILE[what]())
    for read in (Mask.load, check, read_tensors, read_facts):
        with bounded(), suppress(UserError):
            found = read(path)
            assert read is not Mask.load or found == MASK
    if what == "an archive without end":  # torch 2.11 finds the archive's other end, and all of the mask
        with suppress(UserError):
            assert Mask.load(path) == MASK
    else:
        with pytest.raises(UserError, match=r"file\.safetensors"):
            Mask.load(path)


HOSTILE_JSON = {
    "nested lists": b"[" * 10**7,
    "nested objects": b'{"a":' * 10**6,
    "100 MB of digits": b"1" * 10**8,
    "a long number": b'{"format": ' + b"9" * 10**6 + b"}",
    "an endless text": b'"' + b"a" * 10**6,
    "NUL bytes": bytes(10**6),
    "no UTF-8": b"\xff" * 100,
    "half a surrogate pair": b'"\\ud800',
}


@pytest.mark.parametrize("what", HOSTILE_JSON)
def test_hostile_json_is_refused_soon_and_in_little_memory(tmp_path, what):
    path, text = tmp_path / "run.json", HOSTILE_JSON[what]
    path.write_bytes(text)
    for read in (read_json, read_checksummed, read_squad, history.check_format):
        with bounded(), pytest.raises(UserError, match=r"run\.json") as refusal:
            read(path.parent if read is history.check_format else path)
        assert len(str(refusal.value)) < 1000
    log = tmp_path / "log.jsonl"
    log.write_bytes(text)
    with bounded():
        assert history.seconds(tmp_path) == {}


def test_a_line_that_is_no_sentence_of_glue_is_one_broken_line(tmp_path, capsys):
    """Not tokens by the million: a file without its newlines, or one that a crash filled with zeros."""
    path = tmp_path / "train.tsv"
    good = "".join(f"text {i}\t{i % 2}\n" for i in range(200))
    path.write_text("sentence\tlabel\n" + good + "x" * 10**8 + "\t1\n" + "\0" * 100 + "\n")
    tracemalloc.start()
    assert len(read_tsv(path, ROWS["sst2"])) == 200
    assert tracemalloc.get_traced_memory()[1] < 5 * 10**8
    tracemalloc.stop()
    said = capsys.readouterr().out
    assert "line 202: 100,000,002 characters" in said
    assert "line 203: a NUL byte in it" in said
    assert LONGEST > 100 * 5000  # GLUE's own lines are far below it
    path.write_bytes(b"x" * 10**8)
    with pytest.raises(UserError, match="has no column"):
        read_tsv(path, ROWS["sst2"])


def test_what_a_run_directory_says_leads_nowhere_outside_of_it(finished, tmp_path):
    """A level's folder is found by its number in the directory; no name, number or path in a file is one to open."""
    run = Path(shutil.copytree(finished[0], tmp_path / finished[0].name))
    secret = tmp_path / "mask.safetensors"
    shutil.copy(run / "level_01" / "mask.safetensors", secret)
    metrics = run / "level_01" / "metrics.json"
    line = read_checksummed(metrics)
    for level in ("../..", -1, 2, 10**30, None, [1]):
        write_checksummed(metrics, line | {"level": level})
        for read in (history.results, lambda run: read_records([run])):
            with pytest.raises(UserError, match="level_01"):
                read(run)
        assert not inspect(run)
    write_checksummed(metrics, line)
    for place in (run / ".level_09.tmp", run / ".link.tmp"):
        place.symlink_to(tmp_path)
    leftovers = sorted(tmp_path.iterdir())
    cfg = parse("glue", None, ["--task", "rte"])
    from bert_tickets.runs.session import Run

    opened = Run(cfg, "glue")
    opened.dir = run
    with opened:
        assert not list(run.glob(".*.tmp"))
    assert sorted(tmp_path.iterdir()) == leftovers


# ---- what is never called ----


def unpickles(source: str) -> list[str]:
    """Where a module could run what a file says: pickles, and evaluated text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
            found += [f"imports {name}" for name in names if name.split(".")[0] in banned]
        if isinstance(node, ast.Call):
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            name = ast.unparse(node.func)
            if name.endswith("torch.load") and options.get("weights_only") != "True":
                found.append(f"{name} without weights_only=True")
            if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                found.append(f"{name} with allow_pickle")
            if name in ("eval", "exec", "__import__") or name.endswith(("read_pickle", "load_source", "trust_remote_code")):
                found.append(name)
            if options.get("trust_remote_code", "False") != "False":
                found.append(f"{name} with trust_remote_code")
    return found


def test_nothing_is_unpickled_but_weights():
    files = [*(ROOT / "bert_tickets").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    assert {str(path): found for path in files if (found := unpickles(path.read_text(encoding="utf-8")))} == {}
    assert sum("torch.load(" in path.read_text(encoding="utf-8") for path in files) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "def late():\n    import dill",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_module_that_unpickles_is_found(source):
    assert unpickles(source)
