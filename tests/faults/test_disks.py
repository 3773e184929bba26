"""Real full disks and real read-only file systems: a tmpfs of some hundred KiB, in a namespace where we may mount one."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from campaign import VARIANTS, Bench, contents, table
from refusals import finished
from test_refusals import SENTENCE, check_sound
from victims import End, Nursery

pytestmark = pytest.mark.faults
PAGE = 4  # KiB: what a file of a tmpfs grows by


class Disks:
    """Small disks, in folders that only the nursery's processes see them in."""

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery

    def mount(self, *words: str) -> None:
        enter = ["nsenter", "-t", str(self.nursery.process.pid), "-U", "-m", "--preserve-credentials"]
        subprocess.run([*enter, *words], check=True, capture_output=True, text=True)

    @contextmanager
    def disk(self, folder: Path, size: int) -> Iterator[None]:
        """A disk of so many KiB as `folder`."""
        folder.mkdir(parents=True)
        self.mount("mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(folder))
        try:
            yield
        finally:
            self.mount("umount", str(folder))

    def remount(self, folder: Path, option: str) -> None:
        self.mount("mount", "-o", f"remount,{option}", str(folder))

    def seen(self, folder: Path) -> Path:
        """The folder as this process reaches it."""
        return Path(f"/proc/{self.nursery.process.pid}/root{folder}")

    def fill(self, folder: Path) -> None:
        """Leave no room."""
        with open(self.seen(folder) / "filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(PAGE * 1024)):
                pass


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    try:
        with Nursery("unshare", "-rm") as nursery:
            found, folder = Disks(nursery), tmp_path_factory.mktemp("disk") / "first"
            nursery.run(folder.parent, "bert_tickets.runs.verify", ["--help"])  # it has its namespace
            with found.disk(folder, 64):
                found.fill(folder)
            yield found
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        pytest.skip(f"no disk can be mounted here: {getattr(error, 'stderr', None) or error}")


@pytest.fixture(scope="module")
def on_disk(disks, commands, tmp_path_factory) -> Bench:
    return Bench(disks.nursery, commands, tmp_path_factory.mktemp("disks"))


def check_told(end: End, reason: str) -> Path:
    """A run ended with one sentence; which file or folder it names."""
    assert end.code == 2, end
    assert "Traceback" not in end.said, end.said
    assert end.said.count("error: ") == 1, end.said
    told = re.search(SENTENCE, end.said, re.MULTILINE)
    assert told, end.said
    assert told[2] == reason, end.said
    return Path(told[1])


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


SIZES = [
    ("", 10, {"checkpoint.safetensors"}),
    ("--keep-models --save-steps 99", 5, {"mask.safetensors", "weights.safetensors", "level_NN"}),
]


@pytest.mark.parametrize(("words", "pages", "places"), SIZES)
def test_runs_on_disks_of_all_sizes(disks, on_disk, figures, words, pages, places):
    """From one that holds nothing to one that holds everything: it fills up in the checkpoint, the mask, the kept model, ..."""
    began, where, variant = time.monotonic(), Counter(), ("lt_glue.py", words)
    _, expected = on_disk.undisturbed(variant)
    for size in range(PAGE, 2000, PAGE * pages):
        folder = on_disk.folder()
        with disks.disk(folder / "runs", size):
            end, seen = on_disk.run(folder, variant), disks.seen(folder)
            if end.code:
                where["times", re.sub(r"\d\d", "NN", check_told(end, "the disk is full").name)] += 1
                assert temporaries(seen / "runs") == []
                for run in (seen / "runs").iterdir():
                    check_sound(run, tidy=True)
                disks.remount(folder / "runs", "size=4m")
                assert on_disk.run(folder, variant).code == 0
            assert contents(seen) == expected
        shutil.rmtree(folder)
        if end.code == 0:
            break
    assert places <= {name for _, name in where}
    figures.append(
        f"runs on real disks that hold {PAGE} to {size} KiB ({words}): {where.total()}, {time.monotonic() - began:.0f} s"
    )
    figures.extend(table(where, ["times"], "full at"))


def test_a_full_disk_under_the_token_cache(disks, on_disk):
    """Texts are tokenised again; a corpus, which may be larger than memory, has no other place."""
    for variant, told in ((VARIANTS[0], "the tokens are not cached: cannot write cache/"), (VARIANTS[7], "$HF_HOME")):
        _, expected = on_disk.undisturbed(variant)
        folder, dispensable = on_disk.folder(), variant == VARIANTS[0]
        with disks.disk(folder / "cache", PAGE):
            if dispensable:
                disks.fill(folder / "cache")  # or it has room for so few tokens
            end = on_disk.run(folder, variant)
            assert told in end.said
            assert temporaries(disks.seen(folder)) == []
            if dispensable:
                assert end.code == 0
                assert contents(folder) == expected
            else:
                check_told(end, "the disk is full")


def test_runs_on_a_read_only_disk(disks, on_disk):
    """A finished one answers with its table, and every file is sound; one under way is refused, and goes on elsewhere."""
    variant = VARIANTS[0]
    _, expected = on_disk.undisturbed(variant)
    for done in (True, False):
        source, folder = on_disk.source(variant, finished=done), on_disk.folder()
        with disks.disk(folder / "runs", 4000):
            seen = disks.seen(folder)
            shutil.copytree(source / "runs", seen / "runs", dirs_exist_ok=True)
            rewritable = on_disk.run(folder, variant) if done else None
            disks.remount(folder / "runs", "ro")
            before, end = finished(seen), on_disk.run(folder, variant)
            if rewritable:
                assert (end.code, end.said) == (0, rewritable.said)
                assert "sparsity" in end.said
            else:
                check_told(end, "the file system is read-only")
            assert finished(seen) == before
            assert disks.nursery.run(folder, "bert_tickets.runs.verify", ["runs"]).code == 0
            disks.remount(folder / "runs", "rw")
            assert on_disk.run(folder, variant).code == 0
            assert contents(seen) == expected


@pytest.fixture(scope="module")
def tools(on_disk, bert_dir) -> list[tuple[str, str, list[str]]]:
    """What writes a file or folder that is named, by its script, the name, and the other words."""
    (run,) = (on_disk.source(VARIANTS[0], finished=True) / "runs").iterdir()
    masks = [str(run / f"level_0{level}" / "mask.safetensors") for level in (1, 2)]
    return [
        ("oneshot.py", "mask.safetensors", ["--model", str(bert_dir), "--rate", "0.5", "--output"]),
        ("perturb_weight.py", "weights.safetensors", ["--model", str(bert_dir), "--shuffle", "entries", "--output"]),
        ("bert_tickets.export.export", "ticket", [str(run)]),
        ("bert_tickets.masking.similarity", "overlap.png", [*masks, "--output"]),
        ("bert_tickets.masking.similarity", "overlap.json", [*masks, "--json"]),
        ("scripts/figures.py", "curves.svg", ["curves", str(run), "--output"]),
        ("scripts/tables.py", "tables.md", [str(run), "--output"]),
    ]


@pytest.mark.parametrize("full", [True, False], ids=["full", "read-only"])
def test_outputs_on_a_full_or_read_only_disk(disks, on_disk, tools, full):
    for script, name, words in tools:
        folder = on_disk.folder()
        with disks.disk(folder / "disk", 64):
            seen = disks.seen(folder / "disk")
            older = b"older" if name != "ticket" else None
            if older:
                (seen / name).write_bytes(older)
            if full:
                disks.fill(folder / "disk")
            else:
                disks.remount(folder / "disk", "ro")
            end = disks.nursery.run(folder, script, [*words, f"disk/{name}"])
            told = check_told(end, "the disk is full" if full else "the file system is read-only")
            assert folder / told == folder / "disk" / name
            assert temporaries(seen) == []
            assert {path.name for path in seen.iterdir()} == set([name] * bool(older) + ["filler"] * full)
            assert older is None or (seen / name).read_bytes() == older
