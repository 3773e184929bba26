"""A training script as a user runs it: a process in an empty folder, and mistakes."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from bert_tickets.cli import parse, run_command
from bert_tickets.methods.main import run


@pytest.fixture
def words(bert_dir, glue_dir):
    return ["--task", "sst2", "--model", str(bert_dir), "--data-dir", str(glue_dir), "--max-steps", "4"]


def test_a_ticket_is_found(words, tmp_path):
    command = [sys.executable, ROOT / "lt_glue.py", *words, "--levels", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert "level 1/1, 10% pruned: accuracy" in found.stdout
    lines = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/level_*/metrics.json")]
    assert sorted((line["method"], line["level"]) for line in lines) == [("imp", 0), ("imp", 1)]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data-dir", "nowhere"], "no SST-2 data"),
        (["--model", "nowhere"], "nowhere"),
        (["--mask", "nothing.safetensors"], "no mask file at nothing.safetensors"),
        (["--mask", str(ROOT / "LICENSE")], "damaged or not a safetensors file"),
        (["--init", "nothing"], "no such file"),
        (["--device", "cuda:7"], "has no such device"),
        (["--rewind", "400"], "nothing would be trained"),
        (["--max-length", "4096"], "has positions for 128 tokens"),
        (["--output-dir", "/proc/nowhere"], "/proc/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(words, extra, message, tmp_path, monkeypatch, capsys):
    """In this process, to save starting interpreters; `run_command` is what the scripts call."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(run, parse("glue", None, [*words, *extra]))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"error: .*{re.escape(message)}", said)
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/level_*"))
