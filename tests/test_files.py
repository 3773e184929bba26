"""Files that are written atomically, and that are found to be damaged."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bert_tickets.errors import Busy, Damaged
from bert_tickets.files import (
    file_sha256,
    has_facts,
    locked,
    read_checksummed,
    read_facts,
    read_json,
    read_tensors,
    write,
    write_checksummed,
    write_tensors,
    writing,
    writing_folder,
)

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5), "c": torch.zeros(0), "d": torch.tensor(1.5)}
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)


# ---- writing ----


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    write(tmp_path / "new" / "t", b"old")

    def fail() -> None:
        with writing(tmp_path / "new" / "t") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "new" / "t").read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    def fill() -> None:
        with writing(tmp_path / "t"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 't'}'"):
        fill()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def make(error: type[BaseException] | None) -> None:
        with writing_folder(tmp_path / "new") as folder:
            (folder / "t").write_bytes(b"half")
            assert not (tmp_path / "new").exists()
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        make(KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []
    make(None)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["new", "new/t"]


# ---- tensors ----


def test_tensors_and_facts_come_back_and_equal_ones_have_equal_bytes(tmp_path):
    facts = {"é": [1, 2.5], "nested": {"x": None}}
    write_tensors(tmp_path / "t", TENSORS, facts)
    found = read_tensors(tmp_path / "t")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_facts(tmp_path / "t") == facts
    write_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), dict(reversed(facts.items())))
    write_tensors(tmp_path / "other", TENSORS, facts | {"é": [2, 2.5]})
    assert file_sha256(tmp_path / "t") == file_sha256(tmp_path / "two") != file_sha256(tmp_path / "other")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file of tensors."""
    path = tmp_path_factory.mktemp("whole") / "t"
    write_tensors(path, TENSORS, {"step": 3})
    return path.read_bytes()


@SAME_FOLDER
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7) | st.none())
def test_a_tensor_file_with_a_flipped_bit_or_cut_short_is_damaged(tmp_path, whole, at, bit):
    data, place = bytearray(whole), int(at * len(whole))
    if bit is None:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(Damaged):
        read_tensors(tmp_path / "t")


def test_tensors_of_another_package_are_told_apart(tmp_path):
    save_file(TENSORS, tmp_path / "plain")
    write_tensors(tmp_path / "ours", TENSORS)
    assert [has_facts(tmp_path / name) for name in ("plain", "ours")] == [False, True]
    with pytest.raises(Damaged, match="was not written by bert_tickets"):
        read_tensors(tmp_path / "plain")


# ---- JSON ----


@pytest.mark.parametrize("change", [{"a": 2}, {"b": 1}, {"checksum": "0" * 64}, {"checksum": None}])
def test_an_object_comes_back_and_an_edited_one_is_refused(tmp_path, change):
    write_checksummed(tmp_path / "j", {"a": 1, "é": [0.1, None]})
    assert read_checksummed(tmp_path / "j") == {"a": 1, "é": [0.1, None]}
    (tmp_path / "j").write_text(json.dumps(json.loads((tmp_path / "j").read_text()) | change))
    with pytest.raises(Damaged, match="damaged or was edited"):
        read_checksummed(tmp_path / "j")


@pytest.mark.parametrize("text", [b"", b"[1]", b"null", b"{", b'{"a": NaN', b"\xff", b"[" * 10**5, b"1" * 10**5])
def test_content_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "j").write_bytes(text)
    with pytest.raises(Damaged, match="/j is"):
        read_checksummed(tmp_path / "j")


@pytest.mark.parametrize("read", [read_json, read_checksummed, read_facts, read_tensors, has_facts])
def test_a_file_that_is_missing_or_a_folder_is_an_os_error(tmp_path, read):
    for path in (tmp_path / "t", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            read(path)


# ---- locks ----


HOLDER = """
import sys
from pathlib import Path
from bert_tickets.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_another_process_holds_is_busy_until_that_process_dies(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=f"in use by process {process.pid} on {socket.gethostname()}"), locked(tmp_path / "lock"):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock.holder").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not (tmp_path / "lock.holder").exists()
