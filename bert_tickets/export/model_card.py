"""The model card of an exported ticket: a front matter that the hub reads, and what people want to know of it.

A card is made to be public: of folders on this machine it names no more than the last part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets import __version__
from bert_tickets.config import FIELDS, FINDING, flat, offered, preset_of
from bert_tickets.data.text_source import HUB as TEXTS
from bert_tickets.data.text_source import WIKITEXT
from bert_tickets.runs.tickets import Ticket
from bert_tickets.tasks import glue, squad

PAPER = "[The Lottery Ticket Hypothesis for Pre-trained BERT Networks](https://arxiv.org/abs/2007.12223)"
CITATION = """\
@inproceedings{chen2020lottery,
  title = {The Lottery Ticket Hypothesis for Pre-trained {BERT} Networks},
  author = {Chen, Tianlong and Frankle, Jonathan and Chang, Shiyu and Liu, Sijia and Zhang, Yang and Wang, Zhangyang and Carbin, Michael},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {33},
  year = {2020},
  eprint = {2007.12223},
  archivePrefix = {arXiv},
}"""  # noqa: E501
HUB_METRICS = {  # the names of ours in the hub's list of metrics; the others are in none
    "accuracy": "accuracy",
    "accuracy_mm": "accuracy",
    "f1": "f1",
    "exact_match": "exact_match",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "perplexity": "perplexity",
}


@dataclass(frozen=True)
class Kind:
    """What a card says of all tasks of a script."""

    script: str
    opener: str  # the class of transformers
    pipeline: str  # the hub's word for the task
    unit: str  # what the evaluation set is made of


KINDS = {
    "glue": Kind("lt_glue.py", "AutoModelForSequenceClassification", "text-classification", "examples"),
    "squad": Kind("lt_squad.py", "AutoModelForQuestionAnswering", "question-answering", "windows"),
    "mlm": Kind("lt_pretrain.py", "AutoModelForMaskedLM", "fill-mask", "blocks"),
}


def kind_of(ticket: Ticket) -> Kind:
    return KINDS[preset_of(ticket.cfg.task)]


def card(ticket: Ticket, place: str, *, untrained: bool) -> str:
    """README.md of a folder called `place`."""
    parts = [
        f"---\n{front_matter(ticket, untrained=untrained)}\n---",
        f"# {task_name(ticket)}: a ticket of {ticket.base}, {ticket.mask.sparsity:.1%} of its weights removed",
        _what(ticket, untrained=untrained),
        _facts(ticket, untrained=untrained),
        f"## How it was made\n\n{method(ticket)}\n\n{_data(ticket)}\n\n{_settings(ticket)}",
        f"## How to load it\n\n{_loading(ticket, place, untrained=untrained)}",
        f"## How to go on with the mask\n\n{_going_on(ticket, place, untrained=untrained)}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


# ---- what the hub reads ----


def front_matter(ticket: Ticket, *, untrained: bool) -> str:
    """The YAML between the lines of `---`. What only the hub could check is left out: a base model or data of a local
    folder, values of a part of the evaluation set, and any license."""
    from huggingface_hub import EvalResult, ModelCardData

    kind, data = kind_of(ticket), hub_data(ticket)
    metrics = {name: value for name, value in ticket.line["metrics"].items() if name in HUB_METRICS}
    results = [
        EvalResult(
            task_type=kind.pipeline,
            dataset_type=data[0],
            dataset_config=data[1],
            dataset_name=task_name(ticket),
            dataset_split=list(ticket.about["fingerprint"]["evaluation"])[name.endswith("_mm")],
            metric_type=HUB_METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if data and not untrained and value is not None and ticket.cfg.limit_eval is None
    ]
    yaml: str = ModelCardData(
        base_model=None if ticket.is_local else ticket.base,
        library_name="transformers",
        tags=["lottery-ticket", "pruning", "bert-tickets"],
        pipeline_tag=None if untrained else kind.pipeline,
        datasets=[data[0]] if data else None,
        metrics=None if untrained else sorted({HUB_METRICS[name] for name in metrics}),
        model_name=f"{ticket.base}-{ticket.cfg.task}-ticket" if results else None,
        eval_results=results or None,
    ).to_yaml()
    return yaml


def hub_data(ticket: Ticket) -> tuple[str, str | None] | None:
    """The data set on the hub and its configuration; None where the run read files, which may hold anything."""
    task, place = ticket.cfg.task, ticket.about["differs_from_preset"].get("data_dir")
    if task == "mlm":
        place = place or WIKITEXT
        return (place, TEXTS[place]) if place in TEXTS else None
    if place is not None:
        return None
    return (squad.HUB, None) if task == "squad" else (glue.HUB, task)


# ---- what people read ----


def task_name(ticket: Ticket) -> str:
    names = {"squad": "SQuAD v1.1", "mlm": "Masked language modelling"}
    return names.get(ticket.cfg.task) or f"GLUE {glue.ROWS[ticket.cfg.task].folder}"


def _base(ticket: Ticket) -> str:
    if ticket.is_local:
        return f"a BERT kept in a folder called `{ticket.base}`"
    return f"[{ticket.base}](https://huggingface.co/{ticket.base})"


def _what(ticket: Ticket, *, untrained: bool) -> str:
    start = {"pretrained": "pre-trained", "random": "random"}.get(ticket.cfg.init, "given")
    begun = f"A subnetwork of {_base(ticket)}, as in {PAPER}: weights that it lacks are zeros in the weight files, and "
    begun += "`mask.safetensors` says which they are. "
    if untrained:
        return begun + f"This is the ticket itself: {start} weights under the mask, not trained on the task, to be fine-tuned."
    return begun + f"Its {start} weights were trained on the task under the mask; the values below are of this network as it is."


def _facts(ticket: Ticket, *, untrained: bool) -> str:
    about, line, mask = ticket.about, ticket.line, ticket.mask
    made, noted = about.get("environment", {}), about["fingerprint"]  # the oldest runs have no such record
    sets = ", ".join(f"{name}, {facts['examples']:,} {kind_of(ticket).unit}" for name, facts in noted["evaluation"].items())
    git, versions = made.get("git") or {"sha": "not known", "dirty": False}, made.get("versions", {})
    where = f"{noted['precision']} on {made.get('gpu') or noted['device'].upper()}"
    after = " once trained (not of these weights)" if untrained else ""
    rows = {
        "base model": f"{_base(ticket)}; sha256 of the weights begun with `{noted['model']}`",
        "task": task_name(ticket),
        "sparsity": f"{mask.sparsity:.4%}: {mask.kept:,} of {mask.total:,} weights kept",
        **{name + after: "undefined" if value is None else f"{value:.6g}" for name, value in line["metrics"].items()},
        "evaluated on": f"{sets}, in {noted['precision']}",
        **({"but": "; ".join(warnings)} if (warnings := line.get("warnings")) else {}),
        "seed": str(ticket.cfg.train.seed),
        "trained for": f"{line['steps']:,} steps, {where}",
        "mask_sha256": f"`{line['mask_sha256']}`",
        "init_sha256": f"`{line['init_sha256']}` (of the encoder before training, under the mask)",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()) or "not known",
        "git commit": git["sha"] + ", with changes" * git["dirty"],
        "exported by": f"bert_tickets {__version__}",
    }
    return _markdown("what", rows)


def method(ticket: Ticket) -> str:
    """How the mask came about, in sentences."""
    cfg = ticket.cfg
    if cfg.mask is not None:
        known = ", ".join(f"{key} {cut(value)}" for key, value in sorted(ticket.mask.info.items()))
        return f"The mask was given, and trained once. Of its origin its file says: {known or 'nothing'}."
    rate = f"{100 * cfg.rate:g} %"
    start = {"pretrained": "the pre-trained weights", "random": "random weights drawn by the seed"}.get(cfg.init, "given weights")
    after = f"{cfg.rewind} {'of' if cfg.rewind.endswith('%') else 'steps of'} level 0's training"
    back = {"0": f"{start} (theta_0)", "none": ""}.get(cfg.rewind, f"what they were after {after} (theta_i)")
    ranked = "all matrices together" if cfg.scope == "global" else "each matrix by itself"
    head = "and the head with them" if cfg.rewind_head else "but the head goes on"
    return " ".join(
        [
            f"Iterative magnitude pruning, level {ticket.level} of {cfg.levels} (level 0 is the dense network; `--protocol",
            f"{cfg.protocol}`): each level removes {rate} of",
            f"{'the original weights' if cfg.schedule == 'linear' else 'what is left'}, the smallest by magnitude, ranked over",
            f"{ranked} ({cfg.schedule} schedule, {cfg.scope} scope),",
            f"then sets those kept back to {back}, {head}," if back else "goes on from those kept as they are (no rewinding)",
            "and trains again." + " Level 1 group theta_0 itself; level 0 is for comparison." * cfg.prune_first,
        ]
    )


def _data(ticket: Ticket) -> str:
    noted, unit, found = ticket.about["fingerprint"], kind_of(ticket).unit, hub_data(ticket)
    name = f"[{found[0]}](https://huggingface.co/datasets/{found[0]})" if found else "files that were given by --data-dir"
    sets = {"train": noted["train"], **noted["evaluation"]}
    text = ", ".join(f"{key} {facts['examples']:,} {unit} (sha256 `{facts['sha256'][:16]}`)" for key, facts in sets.items())
    limits = [f"--limit-{name} {n}" for name, n in (("train", ticket.cfg.limit_train), ("eval", ticket.cfg.limit_eval)) if n]
    return f"Data: {name}; {text}{', a part of it: ' if limits else ''}{' '.join(limits)}."


def _settings(ticket: Ticket) -> str:
    """Every setting that the result depends on and that had an effect."""
    cfg, differs = ticket.cfg, ticket.about["differs_from_preset"]
    idle = {"model", "task", *(FINDING if cfg.mask is not None else ()), *(("epochs",) if cfg.train.max_steps else ())}
    values = flat(cfg) | {"reset_optimizer": cfg.resets_optimizer} | differs  # which has a file's sha256 for its path
    names = [name for name in offered(preset_of(cfg.task)) if FIELDS[name].metadata["identity"] and name not in idle]
    return _markdown("setting", {name: f"`{cut(values[name])}`" for name in names if values[name] is not None})


def _loading(ticket: Ticket, place: str, *, untrained: bool) -> str:
    opener, row, length = kind_of(ticket).opener, glue.ROWS.get(ticket.cfg.task), ticket.cfg.max_length
    texts = '"a text"'
    if ticket.cfg.task == "squad":
        texts = '"a question", "its context"'
    elif row and len(row.texts) == 2:
        texts = '"a text", "another"'
    code = f"""\
```python
from transformers import {opener}, AutoTokenizer

model = {opener}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
outputs = model(**tokenizer({texts}, truncation=True, max_length={length}, return_tensors="pt"))
```"""
    if row and row.classes:
        code += "\n\nThe classes are " + ", ".join(f"{number} {name}" for number, name in enumerate(row.classes)) + "."
    elif row:
        code += "\n\nThe one logit is the score, from 0 to 5."
    if untrained:
        code += f"\n\nThe head is not trained: it is {_head(ticket)}."
    if not row:
        code += f"""

`{opener}` has no pooler, and the task uses none; but the mask covers it. It is in `pooler.safetensors`, where
bert_tickets finds it by itself, and transformers so:

```python
from safetensors.torch import load_file
from transformers import AutoModel

model = AutoModel.from_pretrained("{place}")  # draws a pooler at random
pooler = load_file("{place}/pooler.safetensors")
model.load_state_dict({{name.removeprefix("bert."): tensor for name, tensor in pooler.items()}}, strict=False)
```"""
    return code


def _head(ticket: Ticket) -> str:
    if ticket.later:
        return "as it was at the step that the weights are of"
    own = "the base model's own where it has one, else " if ticket.cfg.task == "mlm" else ""
    return f"{own}drawn by seed {ticket.cfg.train.seed}, as the run's was"


def _going_on(ticket: Ticket, place: str, *, untrained: bool) -> str:
    cfg, script = ticket.cfg, kind_of(ticket).script
    task = f" --task {cfg.task}" if cfg.task in glue.ROWS else ""
    mask, start = f"--mask {place}/mask.safetensors", "these weights" if untrained else "these trained weights"
    lines = [
        [f"python {script}{task} --model {place} {mask}", f"# {start} under the mask"],
        [f"python {script}{task} --model {ticket.base} {mask}", "# the base model's weights under the mask"],
        [f"python lt_glue.py --task {'mnli' if cfg.task != 'mnli' else 'qqp'} --model {ticket.base} {mask}", "# another task"],
    ]
    width = max(len(command) for command, _ in lines)
    commands = "\n".join(f"{command.ljust(width)}   {remark}" for command, remark in lines)
    return (
        "Ordinary fine-tuning fills the zeros again. bert_tickets trains the subnetwork alone, on this task or on another:\n\n"
        f"```bash\n{commands}\n```\n\n"
        "```python\nfrom bert_tickets.masking.mask import Mask\n\n"
        f'mask = Mask.load("{place}/mask.safetensors")  # names to boolean tensors; True = kept\n```'
    )


def cut(value: Any) -> str:
    """A setting as it may be shown to others: of an absolute path the last part."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _markdown(what: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {what} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
