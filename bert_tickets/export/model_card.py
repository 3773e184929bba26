"""Write the model card of an exported ticket: metadata for the hub, and the run's record of the ticket.

A card is public: it names only the last part of a folder of this machine.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bert_tickets import __version__
from bert_tickets.cli import flags
from bert_tickets.config import flat
from bert_tickets.data import glue_files, squad_files, text_source
from bert_tickets.export.ticket import Ticket
from bert_tickets.runs.directory import levels_of

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True)
class Kind:
    """The constants of the cards of a kind of task."""

    script: str
    opener: str  # class of transformers
    pipeline: str  # the hub's name of the task
    unit: str  # of the evaluation set


KINDS = {
    "glue": Kind("lt_glue.py", "AutoModelForSequenceClassification", "text-classification", "examples"),
    "squad": Kind("lt_squad.py", "AutoModelForQuestionAnswering", "question-answering", "windows"),
    "mlm": Kind("lt_pretrain.py", "AutoModelForMaskedLM", "fill-mask", "blocks"),
}
HUB_METRICS = {  # our metrics, and their names on the hub
    "accuracy": "accuracy",
    "accuracy_mm": "accuracy",
    "f1": "f1",
    "exact_match": "exact_match",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "perplexity": "perplexity",
}


def model_card(ticket: Ticket, name: str, *, untrained: bool) -> ModelCard:
    """Render the card of a folder called `name`."""
    cfg = ticket.cfg
    method = importlib.import_module(f"bert_tickets.methods.{cfg.method.replace('-', '_')}")
    return ModelCard.from_template(
        card_data=card_data(ticket, untrained=untrained),
        template_path=str(TEMPLATE),
        ticket=ticket,
        name=name,
        untrained=untrained,
        kind=KINDS[cfg.kind],
        task=task_name(cfg.task),
        row=glue_files.ROWS.get(cfg.task),
        data=hub_data(ticket),
        method=(method.__doc__ or cfg.method).splitlines()[0],
        levels=levels_of(cfg),
        given={key: without_folder(value) for key, value in sorted(ticket.mask.info.items())} if "mask" in flat(cfg) else None,
        settings=settings(ticket),
        version=__version__,
    )


def card_data(ticket: Ticket, *, untrained: bool) -> ModelCardData:
    """Build the metadata, without local models and data.

    Metrics on a part of the evaluation set (--limit-eval) and of untrained weights are left out.
    """
    kind, data = KINDS[ticket.cfg.kind], hub_data(ticket)
    metrics = {name: value for name, value in ticket.result["metrics"].items() if name in HUB_METRICS}
    splits = list(ticket.about["fingerprint"]["evaluation"])  # MNLI has two
    results = [
        EvalResult(
            task_type=kind.pipeline,
            dataset_type=data[0],
            dataset_config=data[1],
            dataset_name=task_name(ticket.cfg.task),
            dataset_split=splits[name.endswith("_mm")],
            metric_type=HUB_METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if data and not untrained and value is not None and ticket.cfg.limit_eval is None
    ]
    return ModelCardData(
        base_model=None if ticket.is_local else ticket.base,
        library_name="transformers",
        tags=["lottery-ticket", "pruning", "bert-tickets"],
        pipeline_tag=None if untrained else kind.pipeline,
        datasets=[data[0]] if data else None,
        metrics=None if untrained else sorted({HUB_METRICS[name] for name in metrics}),
        model_name=f"{ticket.base}-{ticket.cfg.task}-ticket" if results else None,
        eval_results=results or None,
    )


def hub_data(ticket: Ticket) -> tuple[str, str | None] | None:
    """Return the data set on the hub and its configuration; None for a run on local files."""
    task, place = ticket.cfg.task, ticket.cfg.data_dir
    if task == "mlm":
        place = place or text_source.WIKITEXT
        return (place, text_source.HUB[place]) if place in text_source.HUB else None
    if place is not None:
        return None
    return (squad_files.HUB, None) if task == "squad" else (glue_files.HUB, task)


def task_name(task: str) -> str:
    """Return the task's usual name."""
    return {"squad": "SQuAD v1.1", "mlm": "masked language modelling"}.get(task) or f"GLUE {glue_files.ROWS[task].folder}"


def settings(ticket: Ticket) -> list[tuple[str, str, str]]:
    """Return name, value and meaning of every setting with an effect on the result; files by their sha256."""
    cfg, values = ticket.cfg, flat(ticket.cfg) | ticket.about["differs_from_preset"]
    without = {"model", "task", "method", "epochs" if cfg.train.max_steps else "max_steps"}
    fields = {name: f.metadata for name, f in flags(cfg.kind, cfg.method).items() if name not in without}
    found = [(name, values[name], meta["help"]) for name, meta in fields.items() if meta["affects_result"]]
    return [(name, without_folder(value), meaning) for name, value, meaning in found if value is not None]


def without_folder(value: Any) -> str:
    """Return a value as text; of an absolute path only the last part."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
