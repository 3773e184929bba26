"""Write a level of a run as a Hugging Face folder: the weights with zeros in place, the mask, the tokenizer, a model card."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_tickets.errors import UserError
from bert_tickets.export.load import load
from bert_tickets.export.model_card import model_card, without_folder
from bert_tickets.export.ticket import Ticket, read_ticket
from bert_tickets.files import sha256_of, writing_folder
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.loading import save_model
from bert_tickets.modeling.onnx import check_onnx_installed, write_onnx
from bert_tickets.modeling.parameters import WORD_EMBEDDINGS, encoder_weights, head_weights, set_parameters, untie_decoder
from bert_tickets.runs.integrity import check_files, check_weights, read_own
from bert_tickets.tasks.create import create


def export(
    run: Path,
    output: Path,
    level: int | None = None,
    *,
    untrained: bool = False,
    model: str | None = None,
    onnx: bool = False,
) -> Ticket:
    """Write a level of a run (the newest unless `level` is given) as the folder `output`, which must not exist or be empty.

    The folder holds the trained subnetwork, or with `untrained`, or of a level that searched for its ticket, the weights that
    training starts from. `model` is the base model, if it was moved since the run. `onnx` adds model.onnx, the network without
    the heads and neurons that the mask prunes whole. Raises `UserError` for files that are missing, damaged, or another run's,
    and for a network that cannot be an ONNX file; then no folder is written.
    """
    if onnx:
        check_onnx_installed()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists: give a folder that does not exist yet, or is empty")
    ticket = read_ticket(run, level, model)
    untrained = untrained or ticket.is_search
    with writing_folder(output) as folder:
        if untrained:
            _write_untrained(ticket, folder)
        else:
            _write_trained(ticket, folder)
        ticket.mask.write(folder / "mask.safetensors", **{key: without_folder(value) for key, value in ticket.mask.info.items()})
        if onnx:
            write_onnx(load(folder), folder / "model.onnx")
        model_card(ticket, output.absolute().name, untrained=untrained, onnx=onnx).save(folder / "README.md")
    return ticket


def _write_trained(ticket: Ticket, folder: Path) -> None:
    """Write a level's trained network: its kept model, or its weights in the base model."""
    kept, weights = ticket.folder / "model", ticket.folder / "weights.safetensors"
    if kept.is_dir() and ticket.result.get("model_files"):  # the level records its checksums
        check_files(ticket.run, ticket.level)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return
    if not weights.is_file():
        ways = "Leave out --level; or give --untrained; or repeat the run with --keep-models and another --output-dir"
        raise UserError(f"{ticket.folder} has no trained weights: a run keeps those of its newest level only. {ways}")
    with contextlib.redirect_stdout(io.StringIO()):  # messages about random weights, which are all replaced
        net, tokenizer = _load_base(ticket, "pretrained")
    set_parameters(net, check_weights(ticket.run, ticket.level), weights)
    save_model(net, tokenizer, folder)


def _write_untrained(ticket: Ticket, folder: Path) -> None:
    """Write the network that a level's training started from, m * theta with its head, checked by its `init_sha256`."""
    net, tokenizer = _load_base(ticket, ticket.cfg.init)
    if rewound := ticket.rewind_file:
        set_parameters(net, read_own(rewound, ticket.run), rewound)
    ticket.mask.apply(dict(net.named_parameters()))
    if sha256_of(encoder_weights(net)) != ticket.result["init_sha256"]:
        gone = "those of the previous level, or a missing rewind.safetensors. Leave out --untrained"
        raise UserError(f"{ticket.folder} started from weights that the run no longer has (init_sha256): {gone}")
    save_model(net, tokenizer, folder)


def _load_base(ticket: Ticket, init: str) -> tuple[Net, Any]:
    """Load the base model and its tokenizer. Raises `UserError` unless it has the fingerprints in run.json.

    Without the run's `--init` (a file may be gone) only the architecture can be compared.
    """
    try:
        net, tokenizer = create(ticket.cfg.task).load_net(replace(ticket.cfg, model=ticket.model, init=init))
    except UserError as error:
        raise UserError(f"{ticket.run} cannot be exported without its base model: {error}") from None
    if WORD_EMBEDDINGS in ticket.mask:
        untie_decoder(net)
    recorded = ticket.about["fingerprint"]
    found: dict[str, Any] = {"architecture": {key: net.config.to_dict().get(key) for key in recorded["architecture"]}}
    if init == ticket.cfg.init:
        found |= {"model": sha256_of(encoder_weights(net)), "head": sha256_of(head_weights(net))}
    for key, value in found.items():
        if recorded[key] != value:
            what = ticket.model if init == "pretrained" else f"{ticket.model} with --init {init}"
            raise UserError(f"{what} is not the base model of {ticket.run}: the {key} differs. Restore it, or give --model")
    return net, tokenizer
