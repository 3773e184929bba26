"""Sizes and latencies of networks as ONNX files, in onnxruntime on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bert_tickets.bench.baselines import TrainStep
from bert_tickets.bench.measure import Figures, time_in_turns
from bert_tickets.modeling.onnx import random_inputs, session, write_onnx

BATCH_SIZES, LENGTH = (1, 32), 128


def compare_onnx(nets: Mapping[str, nn.Module], turns: int, steps: int) -> Figures:
    """Measure the files of a dense network and of a slim one, and their latency on batches of 128 tokens without padding."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in nets}
        for name, net in nets.items():
            write_onnx(net, files[name])
            figures[f"{name}: file, MB"] = files[name].stat().st_size / 1e6
        for batch_size in BATCH_SIZES:
            sides = {name: inference(nets[name], file, batch_size) for name, file in files.items()}
            seconds = time_in_turns(sides, turns, steps, torch.device("cpu"))
            figures |= {f"{name}: batch {batch_size}, ms": 1000 * each for name, each in seconds.items()}
            figures[f"slim over dense, batch {batch_size}, times"] = seconds["dense"] / seconds["slim"]
    return figures


def inference(net: nn.Module, file: Path, batch_size: int) -> TrainStep:
    """Build a function that runs an ONNX file once on a batch for `net`."""
    opened, inputs = session(file), random_inputs(net.config, batch_size, LENGTH)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    arrays["attention_mask"][:] = 1
    return lambda _: opened.run(None, arrays)
