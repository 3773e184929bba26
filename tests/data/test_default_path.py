"""The three scripts by their defaults against a small hub: the files' results, online and from the cache; else one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from small_hub import SmallHub, write_hub
from trainrun import train

RUN_SCRIPTS = """
import json, runpy, sys
for command in json.load(sys.stdin):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def hub(bert_dir, glue_dir, squad_dir, corpus_dir, tmp_path_factory) -> Iterator[SmallHub]:
    root = tmp_path_factory.mktemp("hub")
    write_hub(root, bert_dir, glue_dir, squad_dir, corpus_dir)
    hub = SmallHub(root)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def full_cache(hub, by_default, tmp_path_factory) -> Path:
    """The HF_HOME of one run of each script; its runs are beside it."""
    home = tmp_path_factory.mktemp("online") / "hf"
    said = run_scripts(by_default, home.parent, home, hub.url)
    assert exit_codes(said) == [0, 0, 0], said
    assert "downloading rte/train-00000-of-00001.parquet of nyu-mll/glue" in said
    return home


@pytest.fixture(scope="module")
def by_default(commands) -> dict[str, list[str]]:
    """The commands without their --model and --data-dir."""
    return {script: [*without(words, "--model", "--data-dir"), "--levels", "1"] for script, words in commands.items()}


def without(words: list[str], *flags: str) -> list[str]:
    return [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & set(flags)]


def run_scripts(commands: dict[str, list[str]], folder: Path, home: Path, url: str) -> str:
    """Run commands one after the other in a process with its own environment; returns all that they print."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    given = json.dumps([[str(ROOT / script), *words] for script, words in commands.items()])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([sys.executable, "-c", RUN_SCRIPTS], input=given, cwd=folder, env=environment, **streams).stdout


def exit_codes(said: str) -> list[int]:
    return [int(code) for code in re.findall(r"^exit code (\d+)$", said, re.MULTILINE)]


def results(runs: Path) -> dict[str, tuple]:
    """The fingerprints of the data and the results of the runs of a folder, by task."""
    found = {}
    for run in runs.iterdir():
        facts, level = (json.loads((run / file).read_text()) for file in ("run.json", "level_00/metrics.json"))
        data = [facts["fingerprint"][name] for name in ("train", "evaluation")]
        found[level["task"]] = data, [level[name] for name in ("metrics", "losses", "init_sha256")]
    return found


def test_the_hubs_results_are_the_files_also_from_the_cache_alone(hub, full_cache, by_default, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, words in commands.items():
        train(script, [*words, "--levels", "1"])
    assert results(full_cache.parent / "runs") == results(tmp_path / "runs")
    hub.requests.clear()
    monkeypatch.setattr(hub, "faults", {"": (503, "closed")})
    (tmp_path / "again").mkdir()
    said = run_scripts(by_default, tmp_path / "again", full_cache, hub.url)
    assert exit_codes(said) == [0, 0, 0], said
    assert "downloading" not in said
    assert results(tmp_path / "again" / "runs") == results(tmp_path / "runs")
    assert [path for path in hub.requests if "datasets" in path] == []


def test_a_refusal_or_a_damaged_download_is_one_sentence(hub, by_default, bert_dir, tmp_path, monkeypatch):
    message = (
        "Access to dataset nyu-mll/glue is restricted and you are not in the authorized list. " + "Ask for access. " * 20 + "End."
    )
    faults = {
        "/api/datasets/nyu-mll/glue": (403, message),
        "rajpurkar/squad/resolve": None,
        "wikitext-103-raw-v1/train-00001": (410, "Gone"),
    }
    monkeypatch.setattr(hub, "faults", faults)
    local = {script: [*words, "--model", str(bert_dir)] for script, words in by_default.items()}
    said = run_scripts(local, tmp_path, tmp_path / "hf", hub.url)
    assert exit_codes(said) == [2, 2, 2], said
    assert "Traceback" not in said
    errors = re.findall(r"^error: (.*)$", said, re.MULTILINE)
    assert errors[0] == f"cannot read nyu-mll/glue (rte) from the hub: 403 {message}"
    file = tmp_path / "hf/hub/datasets--rajpurkar--squad/snapshots"
    assert re.search(
        rf"damaged. Delete .*/blobs/[0-9a-f]{{64}} and {file}/\w+/plain_text/train-00000-of-00001.parquet", errors[1]
    )
    assert (
        errors[2] == "cannot read wikitext-103-raw-v1/train-00001-of-00002.parquet of Salesforce/wikitext from the hub: 410 Gone"
    )
