"""Errors of the hub and missing files, for every kind of data: they name the ways to get it."""

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
    with pytest.raises(UserError, match=rf"(?s){absent}.*{hub}.*HF_HOME.*--data-dir a folder"):
        read(tmp_path)


def torn(size: int):
    """The stream of a data set, which fails after its first part."""
    yield {"text": ["the film"]}
    raise ConnectionError("no route")


def found(*_: object, **__: object) -> str:
    return "snapshots/0123abc/README.md"


def failing(*_: object, **__: object):
    raise ConnectionError("no route\nand more")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("module", [types.SimpleNamespace(load_dataset=failing), None], ids=["no network", "no package"])
def test_an_error_of_the_hub_names_the_folder(monkeypatch, name, module):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", found)
    monkeypatch.setitem(sys.modules, "datasets", module)  # importing None fails
    with pytest.raises(UserError, match=rf"(?s){name} from the hub: \w[^\n]*\n.*HF_HOME.*--data-dir a folder"):
        READERS[name]()


@pytest.mark.parametrize("download", [found, failing], ids=["in the stream", "of the revision"])
def test_a_later_or_earlier_error_of_a_text_names_the_folder_too(monkeypatch, download):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    stream = types.SimpleNamespace(iter=torn)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: stream))
    with pytest.raises(UserError, match=r"(?s)Salesforce/wikitext[^\n]*: no route\n.*--data-dir a folder"):
        list(READERS.values())[-1]()
