"""Files that say when they are damaged."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_tickets.errors import Busy, Refused, UserError, in_words
from bert_tickets.files import (
    HEADER,
    OBJECT,
    check,
    read_checksummed,
    read_facts,
    read_info,
    read_json,
    read_tensors,
    take_lock,
    write,
    write_checksummed,
    write_tensors,
)

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5), "c": torch.zeros(0)}
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"  # a rename would take the link's place, and nothing be as the user meant it
    link.symlink_to(os.devnull)
    for path in (pipe, link, Path("")):
        with pytest.raises(UserError, match="cannot write"):
            write(path, b"text")
    assert sorted(tmp_path.iterdir()) == [link, pipe]
    assert pipe.is_fifo()
    assert link.is_symlink()
    with pytest.raises(UserError, match="is no file"):
        read_json(pipe)


def test_tensors_and_facts_come_back(tmp_path):
    write_tensors(tmp_path / "t", TENSORS, {"é": [1, 2.5]})
    found = read_tensors(tmp_path / "t")
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_facts(tmp_path / "t") == {"é": [1, 2.5]}
    assert len(read_info(tmp_path / "t")["checksum"]) == 64


@SAME_FOLDER
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_tensor_file_is_found(tmp_path, at, bit):
    write_tensors(tmp_path / "t", TENSORS, {"step": 3})
    data = bytearray((tmp_path / "t").read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    (tmp_path / "t").write_bytes(data)
    try:
        read = read_tensors(tmp_path / "t")
    except UserError:
        return
    # a bit of the padding between header and tensors, or of the checksum's own name: nothing that is read
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert read_facts(tmp_path / "t") == {"step": 3}


@SAME_FOLDER
@given(length=st.integers(0, 400))
def test_a_file_that_was_cut_is_found(tmp_path, length):
    write_tensors(tmp_path / "t", TENSORS)
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[: min(length, len(data) - 1)])
    with pytest.raises(UserError, match="damaged"):
        read_tensors(tmp_path / "t")


def test_a_header_that_claims_terabytes_is_refused_at_once(tmp_path):
    (tmp_path / "t").write_bytes((2**44).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="damaged"):
        check(tmp_path / "t")


def test_a_header_that_is_too_large_for_a_run_is_refused_unread(tmp_path):
    with (tmp_path / "t").open("wb") as file:
        file.write((HEADER + 8).to_bytes(8, "little"))
        file.truncate(2 * HEADER)
    with pytest.raises(UserError, match="its header is said to have 33554440 bytes"):
        check(tmp_path / "t")


def test_an_object_that_is_too_large_for_a_run_is_refused_unread(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(OBJECT + 1)
    with pytest.raises(UserError, match="of its 67,108,865 bytes at most 67,108,864 can be a run's"):
        read_checksummed(tmp_path / "run.json")


def test_files_of_older_versions_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "t")
    assert torch.equal(read_tensors(tmp_path / "t")["a"], TENSORS["a"])
    (tmp_path / "j").write_text('{"a": 1}')
    assert read_checksummed(tmp_path / "j") == {"a": 1}


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=9)


@SAME_FOLDER
@given(st.dictionaries(st.text().filter(lambda key: key != "checksum"), JSON))
def test_a_sealed_object_comes_back(tmp_path, value):
    write_checksummed(tmp_path / "j", value)
    assert read_checksummed(tmp_path / "j") == value


@pytest.mark.parametrize("change", [{"a": 2}, {"b": 1}, {"checksum": "0" * 64}])
def test_a_sealed_object_that_was_edited_is_refused(tmp_path, change):
    write_checksummed(tmp_path / "j", {"a": 1})
    (tmp_path / "j").write_text(json.dumps(json.loads((tmp_path / "j").read_text()) | change))
    with pytest.raises(UserError, match="damaged or was edited"):
        read_checksummed(tmp_path / "j")


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", '{"a": NaN', "\udcff"])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "j").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="damaged"):
        read_checksummed(tmp_path / "j")


# ---- what the file system refuses ----


@pytest.mark.parametrize("before", ["", "process 1 on another\n"])
def test_a_lock_of_this_moment_is_not_said_to_be_anybody_elses(tmp_path, before):
    """Its holder has it before its name is written."""
    (tmp_path / "lock").write_text(before)
    with (tmp_path / "lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        naming = threading.Timer(0.03, (tmp_path / "lock").write_text, ["process 7 on this"])
        naming.start()
        with pytest.raises(Busy, match="in use by process 7 on this; wait"):
            take_lock(tmp_path / "lock")
        naming.join()


def test_a_lock_whose_folder_its_holder_removed_is_busy(tmp_path):
    with pytest.raises(Busy, match="just given up"):
        take_lock(tmp_path / "gone" / "lock")


def test_a_lock_that_its_holder_removes_meanwhile_is_busy(tmp_path, monkeypatch):
    plain = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (plain(file, how), (tmp_path / "lock").unlink()))
    with pytest.raises(Busy, match="just given up"):
        take_lock(tmp_path / "lock")


@pytest.mark.parametrize("read", [read_json, read_checksummed, check, read_facts, read_tensors])
def test_a_file_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, read):
    write_tensors(tmp_path / "t", TENSORS)

    def refuse(path, *_, **options):
        raise OSError(errno.EIO, "no", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(Refused, match=r"cannot read .*/t: Input/output error"):
        read(tmp_path / "t")


def test_what_a_library_in_rust_says_of_the_disk_is_a_refusal(tmp_path):
    with pytest.raises(Refused, match=r"cannot write .*: the disk is full"), in_words(tmp_path):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ValueError, match="a bug"), in_words(tmp_path):
        raise ValueError("a bug")


@pytest.mark.parametrize("place", [".", "file/below", "folder", "link/below"])
def test_what_is_no_place_for_a_file_is_refused_in_words(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("older")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"^cannot write {place}: "):
        write(Path(place), b"newer")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "link"}
    assert (tmp_path / "file").read_text() == "older"
