"""Fingerprints of files: cached by path, size and times of change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from bert_tickets import content
from bert_tickets.content import fingerprint
from bert_tickets.files import file_sha256


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, for files of any size and age."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(content, "SMALL", 0)
    monkeypatch.setattr(content, "SETTLED", -3600.0)
    return tmp_path / "hf" / "bert_tickets"


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read for their sha256."""
    paths = []
    monkeypatch.setattr(content, "file_sha256", lambda path: paths.append(path.name) or file_sha256(path))
    return paths


def again(path) -> str:
    """The fingerprint in a new process."""
    content._cached.cache_clear()
    return fingerprint(str(path))


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"some weights")
    return path


def test_a_file_is_read_once_and_again_after_any_change(large, cache, hashed):
    expected = f"sha256:{file_sha256(large)}"
    assert [fingerprint(str(large)), again(large), again(large)] == [expected] * 3
    assert hashed == ["large"]
    about = large.stat()
    time.sleep(0.02)  # longer than the clock of file systems takes to go on
    large.write_bytes(b"Some weights")
    os.utime(large, ns=(about.st_atime_ns, about.st_mtime_ns))  # the same size and time, as `cp -p` makes it
    assert again(large) == f"sha256:{file_sha256(large)}" != expected
    assert hashed == ["large"] * 2
    shutil.copy2(large, large.with_name("copy"))
    assert again(large.with_name("copy")) == again(large)
    assert hashed == ["large", "large", "copy"]


def test_a_file_that_may_still_change_or_is_small_is_not_cached(large, cache, hashed, monkeypatch):
    monkeypatch.setattr(content, "SETTLED", 2.0)
    assert again(large) == again(large)
    monkeypatch.setattr(content, "SETTLED", -3600.0)
    monkeypatch.setattr(content, "SMALL", 2**20)
    assert fingerprint(str(large)) == fingerprint(str(large))
    assert hashed == ["large"] * 4
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"no JSON", b"[]", b'{"sha256": "0"}'])
def test_a_damaged_row_is_computed_again(large, cache, hashed, damage):
    expected = again(large)
    (row,) = cache.iterdir()
    row.write_bytes(damage)
    assert again(large) == again(large) == expected
    assert hashed == ["large"] * 2


def test_an_unwritable_cache_only_costs_time(large, cache, hashed):
    cache.parent.write_text("not a folder")
    assert again(large) == again(large) == f"sha256:{file_sha256(large)}"
    assert hashed == ["large"] * 2


def test_several_processes_share_a_cache(tmp_path):
    for number in range(20):
        (tmp_path / f"f{number}").write_bytes(bytes([number]))
    program = (
        "from bert_tickets import content; content.SMALL, content.SETTLED = 0, -3600.0\n"
        f"print([content.fingerprint(f'{tmp_path}/f{{n}}') for n in range(20)])"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", program]
    ran = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    results = [process.communicate(timeout=60) for process in ran]
    expected = str([f"sha256:{file_sha256(tmp_path / f'f{number}')}" for number in range(20)])
    assert {(out.decode().strip(), err) for out, err in results} == {(expected, b"")}
    assert sorted(path.suffix for path in (tmp_path / "hf" / "bert_tickets").iterdir()) == [".json"] * 20
