"""ONNX files: onnxruntime computes what the network does, for any batch and length, or there is no file."""

import copy
import importlib.util
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from formula_net import formula_net

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling import onnx as module
from bert_tickets.modeling.onnx import INPUTS, check_onnx_installed, random_inputs, session, write_onnx
from bert_tickets.modeling.slim import remove_units
from bert_tickets.modeling.units import lower


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A network of three layers, one without heads, one without neurons, and its ONNX file."""
    for name in module.NEEDED:
        pytest.importorskip(name)
    path, net = tmp_path_factory.mktemp("onnx") / "model.onnx", formula_net().float()
    neurons = torch.arange(3 * 64).view(3, 64) % 5 > 1
    neurons[2] = False
    units = {"heads": torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]), "neurons": neurons}
    remove_units(net, lower(Mask(units), dict(net.named_parameters())))
    level = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as said:
        write_onnx(net, path)
    assert (said, logging.root.manager.disable) == ([], level)
    return net, path


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 32), (7, 5), (16, 20)])
def test_onnxruntime_computes_the_networks_logits(written, batch, length):
    net, path = written
    inputs = random_inputs(net.config, batch, length)
    assert list(inputs) == list(INPUTS)
    assert batch == 1 or 0 < inputs["attention_mask"].double().mean() < 1
    ran = session(path)
    assert [(each.name, each.shape) for each in ran.get_inputs()] == [(name, ["batch", "length"]) for name in INPUTS]
    assert [(each.name, each.shape) for each in ran.get_outputs()] == [("logits", ["batch", 2])]
    (found,) = ran.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), net(**inputs).logits, rtol=0, atol=1e-5)


def test_the_file_is_valid_and_names_no_path_of_this_machine(written):
    import onnx

    onnx.checker.check_model(str(written[1]), full_check=True)
    content = written[1].read_bytes()
    assert not [word for word in (b"site-packages", b"modeling_bert", b".py") if word in content]
    parameters = 4 * sum(p.numel() for p in written[0].parameters())
    assert parameters < len(content) < parameters + 100_000


@pytest.mark.parametrize("change", ["value", "nan"])
def test_a_file_that_computes_something_else_is_not_written(written, tmp_path, monkeypatch, change):
    import onnx

    program = SimpleNamespace(model_proto=onnx.load(written[1]))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    net = copy.deepcopy(written[0])
    write_onnx(net, tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").exists()
    with torch.no_grad():
        net.classifier.bias[1] += 2e-4 if change == "value" else float("nan")
    with pytest.raises(
        UserError, match=r"no ONNX file was written: in onnxruntime logits differs from torch's, for a batch of 1 x 1"
    ):
        write_onnx(net, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


@torch.no_grad()
def test_every_shape_is_checked(written, monkeypatch):
    """A file that is right for short texts alone is refused, also if padding alone is wrong."""
    net, path = written
    opened = session(path)
    for wrong in (lambda given: given["input_ids"].shape[1] == 32, lambda given: not given["attention_mask"].all()):

        def run(names, given, wrong=wrong):
            return [output + 1.0 * wrong(given) for output in opened.run(names, given)]

        monkeypatch.setattr(module, "session", lambda content, run=run: SimpleNamespace(run=run))
        with pytest.raises(UserError, match="by up to 1;"):
            module._check(net, path.read_bytes())


def test_a_network_that_cannot_be_exported_and_missing_packages_are_sentences(net, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_onnx_installed", lambda: None)
        patch.setattr(torch.onnx, "export", fail)
        with pytest.raises(UserError, match=r"torch .* cannot export the network to ONNX: RuntimeError: no such operator"):
            write_onnx(net, tmp_path / "model.onnx")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find_spec(name))
    with pytest.raises(UserError, match=r"need onnx, onnxruntime, onnxscript: pip install -e '.\[onnx\]'"):
        check_onnx_installed()
    with pytest.raises(UserError, match="need onnx, onnxruntime"):
        write_onnx(net, tmp_path / "model.onnx")
