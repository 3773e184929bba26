"""Errors of the hub, for every kind of data, name the folder to give instead."""

import sys
import types

import pytest

from bert_tickets.data import glue_files, squad_files, text_source
from bert_tickets.errors import UserError

READERS = {
    r"nyu-mll/glue \(rte\)": lambda: glue_files.read_hub("rte", glue_files.ROWS["rte"]),
    "rajpurkar/squad": squad_files.read_hub,
    r"Salesforce/wikitext \(wikitext-103-raw-v1\)": lambda: "".join(text_source.hub_text(text_source.WIKITEXT, "train").read()),
}


def failing(error: Exception, *rows: object):
    def stream(*_, **__):
        yield from rows
        raise error

    def fail(*_, **__):
        raise error

    return stream if rows else fail


@pytest.mark.parametrize("name", READERS)
def test_an_error_of_the_hub_names_the_folder(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "snapshots/0123abc/README.md")
    for error in (ConnectionError("no route to huggingface.co\nand more"), ConnectionError(), OSError(28, "full")):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=failing(error)))
        with pytest.raises(UserError, match=rf"{name}[^\n]*: \S[^\n]*\n.*--data-dir"):
            READERS[name]()
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(UserError, match=rf"{name}.*package datasets.*--data-dir"):
        READERS[name]()


def test_an_error_in_the_stream_or_of_the_revision_names_the_folder(monkeypatch):
    name, error = list(READERS)[-1], ConnectionError("no route")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "snapshots/0123abc/README.md")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=failing(error, {"text": "the film"})))
    with pytest.raises(UserError, match=rf"{name}[^\n]*: no route[^\n]*\n.*--data-dir"):
        READERS[name]()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(error))
    with pytest.raises(UserError, match=rf"{name}[^\n]*: no route[^\n]*\n.*--data-dir"):
        READERS[name]()
