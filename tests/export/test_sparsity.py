"""scripts/verify.py on Hugging Face folders: the sparsity of each matrix, and whether it fits a mask."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import verify
from conftest import Touch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from bert_tickets.cli import run_command
from bert_tickets.export.sparsity import Zeros, misfits
from bert_tickets.masking.mask import Mask

FIRST = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def folder(bert_dir, tmp_path) -> Path:
    """A BertModel of two layers, all dense but one matrix, of which a fourth is zero."""
    model = BertModel.from_pretrained(bert_dir)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[:8] = 0
    model.save_pretrained(tmp_path / "my-bert")
    return tmp_path / "my-bert"


@pytest.fixture
def mask(folder, tmp_path) -> Path:
    """The mask of its zeros, by bert_tickets' names."""
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if name.endswith("weight") and ("encoder.layer" in name or "pooler" in name)]
    matrices = {f"bert.{name}": weights[name] != 0 for name in names if "LayerNorm" not in name}
    Mask(matrices).write(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def verified(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(verify.main, verify.parse([str(word) for word in words]))
    return end.value.code


def change(folder: Path, name: str, function) -> None:
    weights = load_file(folder / "model.safetensors")
    function(weights[name])
    (folder / "model.safetensors").unlink()  # its pages are mapped
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def prefixed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({f"module.bert.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")


def pickled(folder: Path, **options) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def in_parts(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + ('layer.1' in name)}-of-00002.safetensors" for name in weights}
    for file in {*parts.values()}:
        save_file({name: weights[name] for name in weights if parts[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def halved(folder: Path) -> None:
    BertModel.from_pretrained(folder).bfloat16().save_pretrained(folder)


def old_format(folder: Path) -> None:
    pickled(folder, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("form", [lambda folder: None, prefixed, pickled, old_format, in_parts, halved])
def test_every_form_of_weights_is_counted(folder, mask, capsys, form):
    form(folder)
    assert verified(folder) == 0
    out = capsys.readouterr().out
    assert f"{FIRST}    25.0000% zero, 256 of 1,024\n" in out
    assert f"{FIRST.replace('query', 'key')}       0.0000% zero, 0 of 1,024\n" in out
    assert out[out.index(f"{folder}\n") :].count("\n") == 1 + 13 + 1
    assert "1.4706% zero, 256 of 17,408\n" in out
    assert "fit" not in out
    assert verified(folder, "--mask", mask) == 0
    assert f"the weights fit {mask}\n" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_counted_and_the_exit_code_is_1(folder, mask, capsys):
    change(folder, "encoder.layer.0.attention.self.query.weight", lambda weight: weight[0, :3].fill_(1e-30))
    assert verified(folder, "--mask", mask) == 1
    captured = capsys.readouterr()
    assert f"  {FIRST}: 3 weights that the mask prunes are not zero\n" in captured.out
    assert "that the mask keeps" not in captured.out
    assert captured.err == f"do not fit the mask: {folder}\n"
    change(folder, "pooler.dense.weight", lambda weight: weight[0, :2].fill_(-0.0))
    assert verified(folder, "--mask", mask) == 1
    assert "  bert.pooler.dense.weight: 2 weights that the mask keeps are zero\n" in capsys.readouterr().out
    found = {"w": Zeros(200_000, 2, lost=2), "x": Zeros(200_000, 3, lost=3), "y.bias": Zeros(5, 5, lost=5), "z": Zeros(5, 5)}
    assert [(line[:4], bad) for line, bad in misfits(found)] == [("w: 2", False), ("x: 3", True), ("y.bi", False)]
    shutil.copy(mask, folder)  # now it is the folder's own
    assert verified(folder) == 1


def test_a_folder_without_a_pooler_fits(folder, mask, capsys):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: tensor for name, tensor in weights.items() if "pooler" not in name}, folder / "model.safetensors")
    assert verified(folder, "--mask", mask) == 0
    assert "all 12 " in capsys.readouterr().out


def other_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)}, folder / "model.safetensors")


def quantized(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, folder / "model.safetensors")


def with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Touch(folder / "ran")}, folder / "pytorch_model.bin")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"0123456789")


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def wrong_index(folder: Path) -> None:
    without_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_model, "has 0 BERT encoders, not one"),
        (quantized, "is torch.int8, not floating-point"),
        (with_code, "my-bert: pytorch_model.bin: "),
        (damaged, "my-bert: model.safetensors: "),
        (bad_index, "model.safetensors.index.json is not a JSON file"),
        (wrong_index, "it has no weight_map of names of files"),
        (without_weights, "and no weights (model.safetensors or pytorch_model.bin)"),
    ],
)
def test_what_cannot_be_counted_is_a_line_and_exit_code_2(folder, capsys, spoil, message):
    spoil(folder)
    assert verified(folder) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "ran").exists()


def test_a_mask_of_another_network_is_an_error_and_one_with_a_run_too(folder, tmp_path, capsys):
    Mask({FIRST: torch.ones(2, 2, dtype=torch.bool)}).write(tmp_path / "small.safetensors")
    assert verified(folder, "--mask", tmp_path / "small.safetensors") == 2
    assert f"{FIRST} is 32 x 32 in {folder} and 2 x 2 in the mask" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert verified(tmp_path / "run", folder, "--mask", tmp_path / "small.safetensors") == 2
    assert "--mask is for Hugging Face folders" in capsys.readouterr().err
