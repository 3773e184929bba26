"""Write a network as an ONNX file, and check in onnxruntime that it computes the same."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_tickets.errors import UserError, cause
from bert_tickets.files import write
from bert_tickets.seeds import seeded

NEEDED = ("onnx", "onnxruntime", "onnxscript")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # int64 [batch, length], any of both
TOLERANCE = 1e-4


class _Positional(nn.Module):
    """A model of transformers as a function of `INPUTS` that returns tensors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.net(**dict(zip(INPUTS, inputs, strict=True)), return_dict=False)


def check_onnx_installed() -> None:
    """Raise `UserError` unless the packages of the extra `[onnx]` are there."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install -e '.[onnx]'")


@torch.no_grad()
def write_onnx(net: Any, path: Path) -> None:
    """Write a model of transformers as one ONNX file, with any batch and length.

    Inputs and outputs have transformers' names. Raises `UserError` if torch cannot export it, or if in onnxruntime an output
    differs by more than 1e-4; then no file is written.
    """
    check_onnx_installed()
    net = net.eval()
    sample, sizes = random_inputs(net.config, 2, 16), {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet():
        try:
            program = torch.onnx.export(
                _Positional(net),
                tuple(sample.values()),
                input_names=INPUTS,
                output_names=list(net(**sample)),
                dynamic_shapes=((sizes,) * len(INPUTS),),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            content = _without_traces(program.model_proto).SerializeToString()
        except Exception as error:  # the libraries raise a dozen types
            raise UserError(f"torch {torch.__version__} cannot export the network to ONNX: {cause(error)}") from None
    _check(net, content)
    write(path, content)


def session(model: bytes | Path) -> Any:
    """Open an ONNX file, or its content, in onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def random_inputs(config: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Draw `INPUTS` [batch, length]: random tokens of random types, and after the first row's a random amount of padding."""
    generator = seeded(0, "onnx", batch, length)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    real = draw(1, length + 1, batch, 1)
    real[0] = length
    ids, types = draw(0, config.vocab_size, batch, length), draw(0, config.type_vocab_size, batch, length)
    return dict(zip(INPUTS, (ids, (torch.arange(length) < real).long(), types), strict=True))


def _check(net: Any, content: bytes) -> None:
    """Raise `UserError` unless onnxruntime computes the outputs of `net`, for batches of several shapes, with padding."""
    ran, longest = session(content), net.config.max_position_embeddings
    for batch, length in ((1, 1), (5, min(9, longest)), (1, longest), (3, longest)):
        inputs = random_inputs(net.config, batch, length)
        found = ran.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for (name, expected), output in zip(net(**inputs).items(), found, strict=True):
            worst = float((expected - torch.from_numpy(output)).abs().max())
            if not worst <= TOLERANCE:  # nor nan
                where = f"for a batch of {batch} x {length} tokens by up to {worst:.2g}"
                advice = "use other versions of torch, onnx, onnxscript and onnxruntime"
                raise UserError(f"no ONNX file was written: in onnxruntime {name} differs from torch's, {where}; {advice}")


def _without_traces(model: Any) -> Any:
    """Remove what torch notes for debugging, most of a small file: stack traces, with the paths of this machine's packages."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about its own code: deprecations, axes, and the lack of torchvision."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
