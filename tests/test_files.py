"""Files that say when they are damaged."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_tickets import UserError
from bert_tickets.files import check, read_facts, read_info, read_sealed, read_tensors, write_sealed, write_tensors

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5), "c": torch.zeros(0)}
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)


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


def test_files_of_older_versions_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "t")
    assert torch.equal(read_tensors(tmp_path / "t")["a"], TENSORS["a"])
    (tmp_path / "j").write_text('{"a": 1}')
    assert read_sealed(tmp_path / "j") == {"a": 1}


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=9)


@SAME_FOLDER
@given(st.dictionaries(st.text().filter(lambda key: key != "checksum"), JSON))
def test_a_sealed_object_comes_back(tmp_path, value):
    write_sealed(tmp_path / "j", value)
    assert read_sealed(tmp_path / "j") == value


@pytest.mark.parametrize("change", [{"a": 2}, {"b": 1}, {"checksum": "0" * 64}])
def test_a_sealed_object_that_was_edited_is_refused(tmp_path, change):
    write_sealed(tmp_path / "j", {"a": 1})
    (tmp_path / "j").write_text(json.dumps(json.loads((tmp_path / "j").read_text()) | change))
    with pytest.raises(UserError, match="damaged or was edited"):
        read_sealed(tmp_path / "j")


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", '{"a": NaN', "\udcff"])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "j").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="damaged"):
        read_sealed(tmp_path / "j")
