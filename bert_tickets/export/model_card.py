"""Write the model card of an exported ticket: metadata for the hub, and the run's record of the ticket.

A card is public: it names only the last part of a folder of this machine.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bert_tickets import __version__
from bert_tickets.cli import flags
from bert_tickets.config import Config, flat
from bert_tickets.data import glue_files, squad_files, text_source
from bert_tickets.export.ticket import Ticket

KINDS = {  # of tasks: the script, the class of transformers that opens the folder, the hub's name
    "glue": {"script": "lt_glue.py", "opener": "AutoModelForSequenceClassification", "hub": "text-classification"},
    "squad": {"script": "lt_squad.py", "opener": "AutoModelForQuestionAnswering", "hub": "question-answering"},
    "mlm": {"script": "lt_pretrain.py", "opener": "AutoModelForMaskedLM", "hub": "fill-mask"},
}
# The metrics that have another name on the hub.
HUB_METRICS = {"accuracy_mm": "accuracy", "matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}


def model_card(ticket: Ticket, name: str, *, untrained: bool, onnx: bool = False) -> ModelCard:
    """Render the card of a folder called `name`, which has a model.onnx or none."""
    cfg = ticket.cfg
    method = importlib.import_module(f"bert_tickets.methods.{cfg.method}")
    info = {key: without_folder(value) for key, value in sorted(ticket.mask.info.items())}
    return ModelCard.from_template(
        card_data=card_data(ticket, untrained=untrained),
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        ticket=ticket,
        name=name,
        untrained=untrained,
        onnx=onnx,
        kind=KINDS[cfg.kind],
        row=glue_files.ROWS.get(cfg.task),
        data=hub_data(cfg),
        method=" ".join((method.__doc__ or cfg.method).partition("\n\n")[0].split()),
        levels=cfg.settings.levels,
        given=info if cfg.settings.mask is not None else None,
        settings=settings(ticket),
        version=__version__,
    )


def card_data(ticket: Ticket, *, untrained: bool) -> ModelCardData:
    """Build the metadata, without local models and data, and metrics of untrained weights or on a part of the set."""
    cfg, kind, data = ticket.cfg, KINDS[ticket.cfg.kind], hub_data(ticket.cfg)
    metrics = {name: value for name, value in ticket.result["metrics"].items() if value is not None and not untrained}
    splits = list(ticket.about["fingerprint"]["evaluation"])  # MNLI has two
    results = [
        EvalResult(
            task_type=kind["hub"],
            dataset_type=data[0],
            dataset_config=data[1],
            dataset_name=cfg.task,
            dataset_split=splits[name.endswith("_mm")],
            metric_type=HUB_METRICS.get(name, name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if data and cfg.limit_eval is None
    ]
    return ModelCardData(
        base_model=None if ticket.is_local else ticket.base,
        library_name="transformers",
        tags=["lottery-ticket", "pruning", "bert-tickets"],
        pipeline_tag=None if untrained else kind["hub"],
        datasets=[data[0]] if data else None,
        metrics=sorted({HUB_METRICS.get(name, name) for name in metrics}) or None,
        model_name=f"{ticket.base}-{cfg.task}-ticket" if results else None,
        eval_results=results or None,
    )


def hub_data(cfg: Config) -> tuple[str, str | None] | None:
    """Return the data set on the hub and its configuration; None for a run on local files."""
    if cfg.task == "mlm":
        place = cfg.data_dir or text_source.WIKITEXT
        return (place, text_source.HUB[place]) if place in text_source.HUB else None
    if cfg.data_dir is not None:
        return None
    return (squad_files.HUB.name, None) if cfg.task == "squad" else (glue_files.HUB.name, cfg.task)


def settings(ticket: Ticket) -> dict[str, str]:
    """Return every setting with an effect on the result; files by their sha256."""
    cfg, names = ticket.cfg, flags(ticket.cfg.kind, ticket.cfg.method)
    values = flat(cfg) | ticket.about["differs_from_preset"]
    if cfg.train.max_steps is not None:
        values["epochs"] = None
    effective = [name for name, f in names.items() if f.metadata["affects_result"] and values[name] is not None]
    return {name: without_folder(values[name]) for name in effective}


def without_folder(value: Any) -> str:
    """Return a value as text; of an absolute path only the last part."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
