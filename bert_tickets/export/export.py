"""Share a ticket: a level of a run as a Hugging Face folder that plain transformers opens, with its mask and a model card.

  python -m bert_tickets.export.export runs/mnli-imp-s57-... --level 7 mnli-70
  python -m bert_tickets.export.export runs/mnli-imp-s57-... --level 7 --untrained mnli-70-ticket

By itself the folder holds the trained subnetwork, which scores what the run reported; with --untrained the ticket: the
weights that the level started from, to be fine-tuned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import hyphens, run_command
from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from bert_tickets.modeling.bert import Net
    from bert_tickets.runs.tickets import Ticket

NET, MASK = "model.safetensors", "mask.safetensors"


def export(run: Path, output: Path, level: int | None = None, *, untrained: bool = False, model: str | None = None) -> Ticket:
    """Write a level of a run (the newest finished one unless `level` says another) as the folder `output`.

    `model` is where the run's base model lies, if not where run.json says. Nothing of the run is changed. Raises `UserError`
    for what is missing, damaged, or not what the run says it was.
    """
    from bert_tickets.runs.tickets import find

    refuse_occupied(output)
    ticket = find(run, level, model)
    net, tokenizer = load_untrained(ticket) if untrained else load_trained(ticket)
    write_ticket(output, ticket, net, tokenizer, untrained=untrained)
    return ticket


def refuse_occupied(output: Path) -> None:
    """Raise `UserError` unless `output` is free for a folder."""
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: give a folder that is not there yet")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: give a folder that is not there yet")


# ---- the two kinds of weights ----


def load_trained(ticket: Ticket) -> tuple[Net, Any]:
    """The network as the level's training left it, and its tokenizer."""
    from bert_tickets.files import read_tensors
    from bert_tickets.modeling.loading import POOLER
    from bert_tickets.modeling.parameters import set_parameters
    from bert_tickets.runs.integrity import check_model, check_tensors

    kept, file = ticket.folder / "model", ticket.folder / "weights.safetensors"
    whole = kept.is_dir() and not ticket.given  # with configuration and tokenizer: no base model is needed
    if file.is_file():
        check_tensors(file, ticket.run, ticket.level)
    elif kept.is_dir():
        file = kept / NET
    else:
        raise UserError(
            f"{ticket.folder} has no trained weights: a run keeps them of its newest level alone. Leave out --level, give "
            "--untrained for the weights that the level started from, or make the run again with --keep-models and another "
            "--output-dir."
        )
    if whole or file.parent == kept:
        check_model(ticket.run, ticket.level)
    with contextlib.redirect_stdout(io.StringIO()):  # what is said of weights drawn anew: none of them stays
        net, tokenizer = _load(ticket, str(kept) if whole else ticket.model, "pretrained")
    if not whole:
        _check_base(ticket, net, weights=ticket.cfg.init == "pretrained", head=False)
    beside = kept / POOLER  # of a kept model whose class has no pooler
    apart = read_tensors(beside) if file.parent == kept and beside.is_file() else {}
    set_parameters(net, read_tensors(file) | apart, file)
    return net, tokenizer


def load_untrained(ticket: Ticket) -> tuple[Net, Any]:
    """The network as the level's training began: m * theta, with its head; and its tokenizer.

    Raises `UserError` unless the encoder's digest is the one that the level noted when it began.
    """
    from bert_tickets.files import read_tensors, sha256_of
    from bert_tickets.modeling.parameters import encoder_weights, set_parameters
    from bert_tickets.runs.integrity import check_tensors

    cfg = ticket.cfg
    net, tokenizer = _load(ticket, ticket.model, cfg.init)
    _check_base(ticket, net, weights=True, head=True)
    if ticket.later:
        check_tensors(ticket.later, ticket.run)
        set_parameters(net, read_tensors(ticket.later), ticket.later)
    params = dict(net.named_parameters())
    ticket.mask.apply(params)
    if sha256_of(encoder_weights(net)) != ticket.line["init_sha256"]:
        if cfg.rewind == "none":
            raise UserError(
                f"{ticket.folder} did not start from theta_0: with --rewind none a level goes on from the weights of the one "
                "before, which are not kept. Leave out --untrained, or export a run that rewinds."
            )
        file = "metrics.json" if cfg.rewind == "0" else "rewind.safetensors"
        raise UserError(
            f"{ticket.folder} started from other weights (init_sha256) than can be made now: {file} is missing or not what "
            "it was, and a ticket made of this would not be the run's"
        )
    return net, tokenizer


def _load(ticket: Ticket, source: str, init: str) -> tuple[Net, Any]:
    from bert_tickets.tasks import Task
    from bert_tickets.tasks.glue import ROWS, Glue
    from bert_tickets.tasks.mlm import Mlm
    from bert_tickets.tasks.squad import Squad

    name = ticket.cfg.task
    task: Task = Glue(name) if name in ROWS else Squad() if name == "squad" else Mlm()
    try:
        net, tokenizer = task.load_net(replace(ticket.cfg, model=source, init=init))
    except UserError as error:
        raise UserError(f"{ticket.run} cannot be exported without the model it began with: {error}") from None
    ticket.mask.check_fits({name: p for name, p in net.named_parameters() if name in ticket.mask}, source)
    return net, tokenizer


def _check_base(ticket: Ticket, net: Net, *, weights: bool, head: bool) -> None:
    """Raise `UserError` unless the base model is what the run noted of it when it began."""
    from bert_tickets.files import sha256_of
    from bert_tickets.modeling.parameters import encoder_weights

    noted, encoder = ticket.about["fingerprint"], encoder_weights(net)
    here: dict[str, Any] = {"architecture": {key: net.config.to_dict().get(key) for key in noted.get("architecture", ())}}
    if weights:
        here["model"] = sha256_of(encoder)
    if head:
        here["head"] = sha256_of({name: p for name, p in net.named_parameters() if name not in encoder})
    for key, value in here.items():
        if noted.get(key, value) != value:  # the oldest runs noted less
            what = ticket.model if ticket.cfg.init == "pretrained" else f"{ticket.model} with --init {ticket.cfg.init}"
            raise UserError(f"{what} is not what {ticket.run} began with: the {key} differs. Restore it, or give --model.")


# ---- the folder ----


def write_ticket(output: Path, ticket: Ticket, net: Net, tokenizer: Any, *, untrained: bool) -> None:
    """Make the folder appear, complete and checked."""
    from bert_tickets.errors import in_words
    from bert_tickets.export.model_card import card, cut
    from bert_tickets.files import write, writing_folder
    from bert_tickets.modeling.loading import save_plain

    for name in ("is_local", "local_files_only"):  # where it was read from, which is nothing to share
        tokenizer.init_kwargs.pop(name, None)
    text = card(ticket, output.absolute().name, untrained=untrained)
    with writing_folder(output) as folder:
        with in_words(output):
            save_plain(net, folder)
            tokenizer.save_pretrained(folder)
        ticket.mask.write(folder / MASK, **{key: cut(value) for key, value in ticket.mask.info.items()})
        write(folder / "README.md", text.encode())
        check_written(folder, ticket)


def check_written(folder: Path, ticket: Ticket) -> None:
    """Read the folder back: raise `UserError` unless its mask is the level's and each weight that it removes is zero."""
    from bert_tickets.files import read_tensors
    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.loading import POOLER

    mask, line, weights = Mask.load(folder / MASK), ticket.line, read_tensors(folder / NET)
    if (folder / POOLER).exists():
        weights |= read_tensors(folder / POOLER)
    if (mask.sha256(), mask.kept, mask.total) != (line["mask_sha256"], line["kept"], line["total"]):
        raise UserError(f"{ticket.folder} is damaged: its mask keeps {mask.kept:,} of {mask.total:,} weights, and was not to")
    astray = sum(int((weights[name].ne(0) & ~kept).count_nonzero()) for name, kept in mask.items())
    if astray:
        raise UserError(f"{ticket.folder} is damaged: {astray:,} weights that its mask removes are not zero")


# ---- the command ----


def main(args: argparse.Namespace) -> None:
    from bert_tickets.export.model_card import kind_of

    output = Path(args.output)
    ticket = export(Path(args.run), output, args.level, untrained=args.untrained, model=args.model)
    mask, opener = ticket.mask, kind_of(ticket).opener
    sizes = {file.name: file.stat().st_size for file in sorted(output.iterdir())}
    what = "the weights that it started from" if args.untrained else "its trained weights"
    print(f"{output}: level {ticket.level} of {ticket.run}, {what}")
    print(f"  {mask.kept:,} of {mask.total:,} weights kept, {mask.sparsity:.1%} removed")
    print("\n".join(f"  {name:24}{_size(size):>12}" for name, size in {**sizes, "in all": sum(sizes.values())}.items()))
    print(f"open it with transformers.{opener}.from_pretrained({str(output)!r})")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bert_tickets.export.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("output", metavar="DIR", help="the folder to write; must not be there yet, or be empty")
    parser.add_argument("--level", type=int, metavar="N", help="this level, instead of the newest")
    parser.add_argument("--untrained", action="store_true", help="the weights that the level started from, not the trained ones")
    parser.add_argument("--model", metavar="TEXT", help="where the run's base model is now, if not where it was")
    return parser.parse_args(hyphens(argv))


if __name__ == "__main__":
    run_command(main, parse())
