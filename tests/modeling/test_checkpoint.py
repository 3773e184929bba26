"""A model of the hub: from its cache if possible, downloaded if not, and missing only if the hub says so."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from bert_tickets.content import POOLER
from bert_tickets.errors import UserError
from bert_tickets.modeling.checkpoint import resolve
from bert_tickets.modeling.loading import load_bert

NAME, COMMIT = "some/bert", "0123456789" * 4


class Hub:
    """A hub of one model, in place of `hf_hub_download`. Writes the cache as that does."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache = source, cache / "models--some--bert"
        self.asked: list[str] = []
        self.fail: Callable[[str], Exception | None] = lambda _: None

    def __call__(self, name: str, file: str, repo_type: str, revision: str) -> str:
        self.asked.append(file)
        assert (name, repo_type) == (NAME, "model")
        if error := self.fail(file):
            raise error
        for folder in ("refs", "blobs", f"snapshots/{COMMIT}", f".no_exist/{COMMIT}"):
            (self.cache / folder).mkdir(parents=True, exist_ok=True)
        (self.cache / "refs" / "main").write_text(COMMIT)
        if not (self.source / file).is_file():
            (self.cache / ".no_exist" / COMMIT / file).touch()
            raise EntryNotFoundError("404")
        content = (self.source / file).read_bytes()
        small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = self.cache / "blobs" / (hashlib.sha256(content).hexdigest() if file.endswith(".safetensors") else small)
        blob.write_bytes(content)
        path = self.cache / "snapshots" / COMMIT / file
        path.symlink_to(blob)
        return str(path)


@pytest.fixture
def hub(bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(Path(shutil.copytree(bert_dir, tmp_path / "source")), tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    return hub


def load() -> Any:
    return load_bert(NAME, "classifier", "pretrained", 0)[0]


def drop_pooler(hub: Hub) -> None:
    weights = load_file(hub.source / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "pooler" not in key}
    save_file(kept, hub.source / "model.safetensors", {"format": "pt"})
    save_file({f"bert.{key}": weights[key] for key in weights if "pooler" in key}, hub.source / POOLER)


def unreachable(_: str) -> Exception:
    error = LocalEntryNotFoundError("cannot find it; check your connection")
    error.__cause__ = ConnectionError("the service is down")
    return error


def test_a_model_is_downloaded_once_and_then_read_without_the_hub(hub):
    folder = resolve(NAME)
    assert folder == hub.cache / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == {path.name for path in hub.source.iterdir()}
    load()
    count, hub.fail = len(hub.asked), unreachable
    assert resolve(NAME) == folder
    load()
    assert len(hub.asked) == count


def test_a_folder_is_used_as_it_is(bert_dir, tmp_path, monkeypatch):
    assert resolve(str(bert_dir)) == bert_dir
    monkeypatch.chdir(bert_dir.parent)
    assert resolve(bert_dir.name).samefile(bert_dir)
    with pytest.raises(UserError, match="is a file"):
        resolve(str(bert_dir / "config.json"))
    with pytest.raises(UserError, match="there is no such folder"):
        resolve(str(tmp_path / "gone"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "adapter_config.json", POOLER])
def test_only_the_hubs_answer_that_a_file_does_not_exist_is_missing(hub, file):
    drop_pooler(hub)
    hub.fail = lambda asked: unreachable(asked) if asked == file else None
    with pytest.raises(UserError, match=rf"(?s)cannot read {file} of {NAME} .*the service is down\n.*copy its HF_HOME"):
        load()
    hub.fail = lambda _: None
    assert load().bert.pooler.dense.weight.equal(load_file(hub.source / POOLER)["bert.pooler.dense.weight"])


def test_offline_a_cache_without_marks_is_used_but_for_a_pooler_that_may_exist(hub, monkeypatch):
    """As another program leaves it: nothing says which files the model does not have."""
    resolve(NAME)
    shutil.rmtree(hub.cache / ".no_exist")
    hub.fail = unreachable
    with pytest.raises(UserError, match="the service is down"):
        load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load()
    shutil.rmtree(hub.cache)
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        load()
    drop_pooler(hub)
    (hub.source / POOLER).unlink()
    hub.fail = lambda _: None
    resolve(NAME)
    shutil.rmtree(hub.cache / ".no_exist")
    hub.fail = unreachable
    with pytest.raises(UserError, match=f"cannot read {POOLER} of .* not in the cache, and HF_HUB_OFFLINE is set"):
        load()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_download_is_named_with_what_to_delete(hub, file):
    path = resolve(NAME) / file
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} does not match the hash.*Delete {hub.cache}/blobs/\w+ and {path},"):
        load()
    shutil.rmtree(hub.cache)
    load()


def test_all_files_of_an_index_are_downloaded(hub):
    weights = load_file(hub.source / "model.safetensors")
    (hub.source / "model.safetensors").unlink()
    names = sorted(weights)
    for part in (0, 1):
        save_file({key: weights[key] for key in names[part::2]}, hub.source / f"model-{part}.safetensors")
    listed = ", ".join(f'"{key}": "model-{n % 2}.safetensors"' for n, key in enumerate(names))
    (hub.source / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{listed}}}}}')
    assert load().bert.pooler.dense.weight.equal(weights["pooler.dense.weight"])
    (hub.source / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is not a JSON file"):
        load_bert(str(hub.source), "classifier", "pretrained", 0)


def test_a_list_of_all_files_in_the_cache_says_what_is_missing(hub, monkeypatch):
    """As `hf download` of huggingface_hub 2 leaves it."""
    resolve(NAME)
    shutil.rmtree(hub.cache / ".no_exist")
    listed = [SimpleNamespace(path=path.name) for path in hub.source.iterdir()]
    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", lambda *_, **__: listed, raising=False)
    hub.fail = unreachable
    load()
