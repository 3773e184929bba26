"""Other locales and systems: letters that a locale lacks, paths that are not UTF-8, Windows."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale without UTF-8


def ran(*words: Any, locale: dict[str, str] = ASCII, **options: Any) -> tuple[int, str, bytes]:
    """Run Python with these words; returns its exit code, stdout and stderr."""
    environment = {**os.environb, b"OMP_NUM_THREADS": b"1", b"PYTHONPATH": os.fsencode(ROOT)}
    environment |= {os.fsencode(key): os.fsencode(value) for key, value in locale.items()}
    found = subprocess.run([sys.executable, *words], capture_output=True, env=environment, **options)
    return found.returncode, found.stdout.decode("ascii"), found.stderr


def test_letters_that_the_locale_lacks_are_printed_as_escapes():
    program = "from bert_tickets.cli import run_command; run_command(print, 'caf\\xe9')"
    assert ran("-c", program) == (0, "caf\\xe9\n", b"")


@pytest.mark.parametrize("locale", [ASCII, {"PYTHONUTF8": "1"}])
def test_a_path_that_is_not_utf8_in_this_locale_is_refused(tmp_path, locale):
    """The tokenizer and the weights are read by libraries in Rust, which would not find it, or write another."""
    name = "mod\u00e8le".encode("utf-8" if locale is ASCII else "latin-1")
    folder, words = os.fsencode(tmp_path) + b"/" + name, [ROOT / "lt_glue.py", "--task=rte", "--dry-run"]
    os.mkdir(folder)
    for place, more in ((tmp_path, [b"--model=" + name]), (folder, [])):
        code, _, complained = ran(*words, *more, locale=locale, cwd=place)
        assert (code, complained.count(b"\n")) == (2, 1)
        assert b"is not UTF-8 (the encoding of this locale is " in complained


RUN_AND_EXPORT = """
import pathlib, sys
sys.path.append("scripts")
import export
from bert_tickets.cli import parse, run_command
from bert_tickets.methods.main import run

def main():
    run(parse("glue", None))
    (folder,) = pathlib.Path(sys.argv[-1]).iterdir()
    export.main(export.parse([str(folder), f"{folder}/exported"]))

run_command(main)
"""


def test_a_run_in_a_locale_without_utf8_keeps_models_and_exports_them(commands, tmp_path):
    """The vocabulary and the texts hold other letters than ASCII's."""
    words = [*commands["lt_glue.py"], "--levels", "1", "--keep-models", "--output-dir", str(tmp_path)]
    code, _, complained = ran("-c", RUN_AND_EXPORT, *words, cwd=ROOT)
    assert code == 0, complained
    (run,) = tmp_path.iterdir()
    for folder in ("level_00/model", "exported"):
        assert "“" in (run / folder / "tokenizer.json").read_text(encoding="utf-8")
    assert (run / "exported" / "README.md").exists()


@pytest.mark.parametrize("absent", ["fcntl", "resource"])
def test_windows_has_help_and_one_sentence(tmp_path, absent):
    program = f"import sys, runpy; sys.modules['{absent}'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
    for script in ("lt_glue.py", "oneshot.py", "scripts/tables.py"):
        code, said, _ = ran("-c", program, ROOT / script, "--help")
        assert (code, said[:6]) == (0, "usage:")
    for words in (["lt_glue.py", "--task=rte"], ["oneshot.py", "--rate=0.5", "--output=m"], ["scripts/tables.py", "runs"]):
        code, _, complained = ran("-c", program, ROOT / words[0], *words[1:], cwd=tmp_path)
        assert (code, complained.count(b"\n")) == (2, 1)
        assert b"needs Linux or macOS" in complained
