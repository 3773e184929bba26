"""Data of the hub and missing files: which revision is read, and errors that name the cause and the ways to get the data."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import sys
import types
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from small_hub import REVISION, write_shards

from bert_tickets.data import glue_files, squad_files, text_source
from bert_tickets.data.hub import find_dataset
from bert_tickets.errors import UserError, cause
from bert_tickets.hub import Repository

READERS = {
    r"nyu-mll/glue \(rte\)": lambda: glue_files.read_hub("rte", glue_files.ROWS["rte"]),
    r"rajpurkar/squad \(plain_text\)": squad_files.read_hub,
    r"Salesforce/wikitext \(wikitext-103-raw-v1\)": lambda: text_source.hub_texts(text_source.WIKITEXT),
}
NAME, CONFIG = "owner/texts", "en"


@pytest.fixture
def online(monkeypatch) -> None:
    """Take back the tests' HF_HUB_OFFLINE; the hub's client is replaced."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("read", "absent", "hub"),
    [
        (lambda folder: glue_files.read_folder(folder, glue_files.ROWS["mnli"]), "MNLI/train.tsv", "nyu-mll/glue"),
        (squad_files.read_folder, "dev-v1.1.json", "rajpurkar/squad"),
        (lambda folder: text_source.find_texts(str(folder)), "en.valid", "Salesforce/wikitext"),
    ],
)
def test_missing_files_name_three_ways_to_get_the_data(tmp_path, read, absent, hub):
    for file in ("train-v1.1.json", "en.train"):
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=rf"(?s){absent}.*{hub}.*run this command once.*HF_HOME.*--data-dir a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_without_a_cache_and_offline_the_error_names_the_ways(hub_cache, name):
    with pytest.raises(UserError, match=rf"(?s)cannot read {name} .*HF_HUB_OFFLINE is set.*HF_HOME.*--data-dir a folder"):
        READERS[name]()


# ---- the cache ----


def found(count: int = 1):
    return find_dataset(Repository("dataset", NAME, "a folder"), CONFIG, ["train", "validation"][:count])


def texts(split: str = "train") -> list[str]:
    return [text for (column,) in found().columns(split, ["text"], rows=2) for text in column]


def snapshot(cache: Path, revision: str, age: int = 0, **shards: int) -> Path:
    """Write a revision into the cache, with 7 rows that name it; returns its folder."""
    folder = cache / "datasets--owner--texts/snapshots" / revision
    for split, count in shards.items():
        write_shards(folder / CONFIG, split, {"text": [f"{revision} {split} {i}" for i in range(7)]}, count)
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder


def test_the_newest_revision_with_all_splits_is_read_in_order(hub_cache):
    snapshot(hub_cache, "old", 9, train=3, validation=1)
    snapshot(hub_cache, "new", 5, train=3, validation=1)
    snapshot(hub_cache, "begun", 1, train=1)
    for file in (snapshot(hub_cache, "links", 0, train=1, validation=1) / CONFIG).iterdir():
        file.unlink()
        file.symlink_to(hub_cache / "deleted")
    assert found(2).revision == "new"
    assert found(1).revision == "begun"
    assert [text for (column,) in found(2).columns("train", ["text"]) for text in column] == [f"new train {i}" for i in range(7)]


def test_main_of_the_cache_is_read_though_others_are_newer(hub_cache):
    for revision, age in (("older", 9), (REVISION, 5), ("newer", 1)):
        snapshot(hub_cache, revision, age, train=1)
    main = hub_cache / "datasets--owner--texts/refs/main"
    main.parent.mkdir()
    for text in (REVISION, REVISION.replace("0", "1"), "", "\0" * 40):  # damaged ones count as none
        main.write_text(text)
        assert found().revision == (REVISION if text == REVISION else "newer")


def test_a_folder_of_the_data_sets_name_has_no_effect(hub_cache, tmp_path, monkeypatch):
    snapshot(hub_cache, "good", train=1)
    write_shards(tmp_path / NAME / CONFIG, "train", {"text": ["another"]})
    (tmp_path / NAME / "texts.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    assert texts()[0] == "good train 0"


@pytest.mark.parametrize(
    ("damage", "says"),
    [("of a named file", "does not match the hash that names it"), ("of another", "cannot be read"), ("column", "with text")],
)
def test_a_damaged_file_is_named(hub_cache, damage, says):
    file = snapshot(hub_cache, "good", train=1) / CONFIG / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    if damage == "column":
        write_shards(file.parent, "train", {"body": ["text"]})
    elif damage == "of another":
        file.write_bytes(content[:-20])
    else:
        content[20] ^= 1
        blob = hub_cache / ("ab" * 32)
        blob.write_bytes(content)
        file.unlink()
        file.symlink_to(blob)
    with pytest.raises(UserError, match=rf"{says}.* damaged. Delete (.*/(ab){{32}} and )?{file}, and give"):
        texts()


def test_a_file_that_is_not_in_the_cache_is_downloaded_from_the_same_revision(hub_cache, online, monkeypatch, capsys):
    """And a link without its content is no file."""
    folder = snapshot(hub_cache, REVISION, train=2)
    names = [f"{CONFIG}/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    content = (folder / names[1]).read_bytes()
    (folder / names[1]).unlink()
    (folder / names[1]).symlink_to(hub_cache / "deleted")
    asked = []

    def download(name: str, file: str, **options) -> str:
        asked.append((name, file, options))
        (folder / file).unlink()
        (folder / file).write_bytes(content)
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(texts()) == 7
    assert asked == [(NAME, names[1], {"repo_type": "dataset", "revision": REVISION})]
    assert capsys.readouterr().out == f"downloading {names[1]} of {NAME}\n"


# ---- errors ----


def failing(error: BaseException):
    """A function of the hub's client, which wraps the error twice."""

    def fail(*_: object, **__: object):
        try:
            raise error
        except Exception as inner:
            try:
                raise LocalEntryNotFoundError("An error happened while " + "trying to locate the file " * 20) from inner
            except OSError as outer:
                raise OSError("We could not connect") from outer

    return fail


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), r"from the hub: .*Connection refused\nThree"),
        (socket.gaierror(-2, "Name or service not known"), r"from the hub: .*not known\nThree"),
        (EOFError("peer closed connection"), r"cannot read .* from the hub: EOFError: peer closed"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"), r"from the hub: .*WRONG_VERSION_NUMBER.*\nThree"),  # 1 is EPERM, too
        (PermissionError(errno.EACCES, "Permission denied"), r"from the hub: .*denied\nThree"),  # of a firewall
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot keep .* in the hub.s cache, /.*No space left.*Set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "in the cache"), r"cannot keep .* in the hub.s cache, /.*denied: '/"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_innermost_cause_is_named_and_the_right_one_is_blamed(hub_cache, online, monkeypatch, error, says):
    if getattr(error, "filename", None) == "in the cache":
        error.filename = str(hub_cache / "refs")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", failing(error))
    with pytest.raises(UserError, match=says):
        found()
    snapshot(hub_cache, REVISION, train=2)
    (hub_cache / f"datasets--owner--texts/snapshots/{REVISION}/{CONFIG}/train-00001-of-00002.parquet").unlink()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(error))
    with pytest.raises(UserError, match=says):
        texts()


@pytest.mark.parametrize(("status", "calls"), [(503, 3), (403, 1)])
def test_an_overloaded_hub_is_asked_again_and_a_refusal_is_final(hub_cache, online, monkeypatch, status, calls):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    asked = []

    def answer(self, name: str):
        asked.append(name)
        if len(asked) < 3:
            raise HfHubHTTPError("the hub's error", response=response, server_message="Sorry")
        file = types.SimpleNamespace(rfilename=f"{CONFIG}/train-00000-of-00001.parquet")
        return types.SimpleNamespace(sha=REVISION, siblings=[file])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="403 Sorry") if status == 403 else contextlib.nullcontext():
        assert found().revision == REVISION
    assert len(asked) == calls


def test_a_repository_without_the_files_is_named(hub_cache, online, monkeypatch):
    file = types.SimpleNamespace(rfilename=f"{CONFIG}/train.jsonl")
    about = types.SimpleNamespace(sha=REVISION, siblings=[file])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: about)
    with pytest.raises(UserError, match=rf"{NAME} on the hub has no files {CONFIG}/train-\*\.parquet: give a folder"):
        found()


def test_a_cache_that_is_not_utf8_is_not_blamed_on_a_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/caf\udce9")
    with pytest.raises(UserError, match="is not UTF-8"):
        Repository("model", NAME, "a folder").fetch("config.json")


def test_a_broken_pyarrow_is_not_blamed_on_the_hub(hub_cache, monkeypatch):
    snapshot(hub_cache, "good", train=1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it fails
    with pytest.raises(UserError, match=r"by means of pyarrow, which cannot be imported: .*pyarrow.*\nThree ways"):
        texts()


def test_a_lookup_that_failed_before_is_not_the_cause():
    error = ValueError("two\n lines  " + "x" * 600 + " the end")
    error.__context__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "refs/main")
    error.__context__.__context__ = KeyError("name")
    said = cause(error)
    assert said.startswith("ValueError: two lines xxx")
    assert said.endswith("x the end")
    assert len(said) == 500
