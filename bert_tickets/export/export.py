"""Write a level of a run as a Hugging Face folder: the weights with zeros in place, the mask, the tokenizer, a model card."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bert_tickets.errors import Damaged, UserError
from bert_tickets.export.model_card import model_card, without_folder
from bert_tickets.export.ticket import Ticket, load_ticket
from bert_tickets.files import read_tensors, sha256_of, writing_folder
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.loading import POOLER, save_model
from bert_tickets.modeling.parameters import WORD_EMBEDDINGS, encoder_weights, head_weights, set_parameters, untie_decoder
from bert_tickets.runs.integrity import check_model, read_own
from bert_tickets.tasks.create import create

NET, MASK = "model.safetensors", "mask.safetensors"


def export(run: Path, output: Path, level: int | None = None, *, untrained: bool = False, model: str | None = None) -> Ticket:
    """Write a level of a run (the newest unless `level` is given) as the folder `output`, which must not exist or be empty.

    The folder holds the trained subnetwork, or with `untrained` the weights that the level started from. `model` is the base
    model, if it was moved since the run. Raises `UserError` for files that are missing, damaged, or another run's; then no
    folder is written.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists: give a folder that does not exist yet, or is empty")
    ticket = load_ticket(run, level, model)
    net, tokenizer = load_untrained(ticket) if untrained else load_trained(ticket)
    with writing_folder(output) as folder:
        for name in ("is_local", "local_files_only"):  # true on this machine only
            tokenizer.init_kwargs.pop(name, None)
        save_model(net, tokenizer, folder)
        ticket.mask.write(folder / MASK, **{key: without_folder(value) for key, value in ticket.mask.info.items()})
        model_card(ticket, output.absolute().name, untrained=untrained).save(folder / "README.md")
        _check_zeros(folder, ticket)
    return ticket


def _check_zeros(folder: Path, ticket: Ticket) -> None:
    """Read the folder back. Raises `Damaged` if a pruned weight is not zero."""
    weights = _read_model(folder)
    for name, kept in Mask.load(folder / MASK).items():
        if wrong := int(weights[name][~kept].count_nonzero()):
            raise Damaged(f"{ticket.folder} is damaged: {wrong:,} pruned weights of {name} are not zero")


def _read_model(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a Hugging Face folder, with those of a pooler in its own file."""
    beside = folder / POOLER
    return load_file(folder / NET) | (read_tensors(beside) if beside.exists() else {})


# ---- trained and untrained weights ----


def load_trained(ticket: Ticket) -> tuple[Net, Any]:
    """Load the trained network of a level, from the newest level's weights or a kept model, and its tokenizer."""
    newest, kept = ticket.folder / "weights.safetensors", ticket.folder / "model"
    has_kept = kept.is_dir() and ticket.moved is None  # with configuration and tokenizer: needs no base model
    if has_kept or not newest.is_file():
        check_model(ticket.run, ticket.level)
    with contextlib.redirect_stdout(io.StringIO()):  # messages about random weights, which are all replaced
        net, tokenizer = _load(ticket, str(kept) if has_kept else ticket.model, "pretrained")
    if not has_kept:
        _check_base(ticket, net, weights=ticket.cfg.init == "pretrained", head=False)
    if newest.is_file():
        set_parameters(net, read_own(newest, ticket.run, ticket.level), newest)
    elif kept.is_dir():
        set_parameters(net, _read_model(kept), kept)
    else:
        raise UserError(
            f"{ticket.folder} has no trained weights: a run keeps those of its newest level only. Leave out --level; or give "
            "--untrained; or repeat the run with --keep-models and another --output-dir"
        )
    return net, tokenizer


def load_untrained(ticket: Ticket) -> tuple[Net, Any]:
    """Load the network that the level's training started from, m * theta with its head, and its tokenizer.

    Raises `UserError` unless the encoder matches `init_sha256` of the level's metrics.json.
    """
    net, tokenizer = _load(ticket, ticket.model, ticket.cfg.init)
    _check_base(ticket, net, weights=True, head=True)
    if ticket.rewind_file:
        set_parameters(net, read_own(ticket.rewind_file, ticket.run), ticket.rewind_file)
    ticket.mask.apply(dict(net.named_parameters()))
    if sha256_of(encoder_weights(net)) != ticket.result["init_sha256"]:
        raise UserError(
            f"{ticket.folder} started from weights that the run no longer has (init_sha256): those of the previous level, or a "
            "missing rewind.safetensors. Leave out --untrained"
        )
    return net, tokenizer


def _load(ticket: Ticket, source: str, init: str) -> tuple[Net, Any]:
    try:
        net, tokenizer = create(ticket.cfg.task).load_net(replace(ticket.cfg, model=source, init=init))
    except UserError as error:
        raise UserError(f"{ticket.run} cannot be exported without its base model: {error}") from None
    if ticket.cfg.task == "mlm" and WORD_EMBEDDINGS in ticket.mask:
        untie_decoder(net)
    ticket.mask.check_fits(dict(net.named_parameters()), source, partly=True)
    return net, tokenizer


def _check_base(ticket: Ticket, net: Net, *, weights: bool, head: bool) -> None:
    """Raise `UserError` unless the base model has the fingerprints in run.json."""
    recorded = ticket.about["fingerprint"]
    found: dict[str, Any] = {"architecture": {key: net.config.to_dict().get(key) for key in recorded["architecture"]}}
    if weights:
        found["model"] = sha256_of(encoder_weights(net))
    if head:
        found["head"] = sha256_of(head_weights(net))
    for key, value in found.items():
        if recorded[key] != value:
            what = ticket.model if ticket.cfg.init == "pretrained" else f"{ticket.model} with --init {ticket.cfg.init}"
            raise UserError(f"{what} is not the base model of {ticket.run}: the {key} differs. Restore it, or give --model")
