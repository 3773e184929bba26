"""`scripts/export.py --onnx`: model.onnx beside the weights computes what plain transformers does with their zeros."""

import export as script
import pytest
import torch
import transformers
from test_load import KINDS, inputs_of

from bert_tickets.errors import UserError
from bert_tickets.modeling import onnx as module
from bert_tickets.modeling.onnx import NEEDED, session

for name in NEEDED:
    pytest.importorskip(name)


def export(*words):
    script.main(script.parse([*map(str, words), "--onnx"]))


@torch.no_grad()
@pytest.mark.parametrize("task", ["squad", "mlm"])  # a classifier: tests/modeling/test_onnx.py
def test_a_ticket_is_exported_as_onnx(slim_tickets, tmp_path, capsys, task):
    folder, (kind, names) = tmp_path / "ticket", KINDS[task]
    export(slim_tickets[task].run, folder)
    expected = getattr(transformers, kind).from_pretrained(folder)(**inputs_of())
    ran = session(folder / "model.onnx")
    found = ran.run(None, {name: tensor.numpy() for name, tensor in inputs_of().items()})
    assert [each.name for each in ran.get_outputs()] == list(expected) == names
    for name, output in zip(names, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), expected[name], rtol=0, atol=1e-4)
    megabytes = [f"{(folder / file).stat().st_size / 1e6:.3g} MB" for file in ("model.onnx", "model.safetensors")]
    assert megabytes[0] != megabytes[1]
    assert f"in onnxruntime, {megabytes[0]}, model.safetensors with its zeros {megabytes[1]}" in capsys.readouterr().out
    assert "`model.onnx` is the network without" in (folder / "README.md").read_text()
    assert "model.onnx" not in (slim_tickets[task].trained / "README.md").read_text()


def test_without_units_or_packages_or_an_exporter_that_works_nothing_is_written(slim_tickets, train_task, tmp_path, monkeypatch):
    run, output = train_task("rte", tmp_path / "runs", "--levels", 1), tmp_path / "o" / "ticket"
    with pytest.raises(UserError, match="nothing can be removed: the mask prunes no head"):
        export(run, output)

    def fail(*_, **__):
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", fail)
        with pytest.raises(UserError, match="cannot export the network to ONNX"):
            export(slim_tickets["rte"].run, output)
    monkeypatch.setattr(module, "NEEDED", ("nowhere",))
    with pytest.raises(UserError, match=r"need nowhere: pip install -e '.\[onnx\]'"):
        export(tmp_path / "no run", output)
    assert not list(output.parent.iterdir())
