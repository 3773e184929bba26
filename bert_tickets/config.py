"""A run's settings: frozen dataclasses, and the presets that fill them.

Imports no torch, so that `--help` is fast. A method has its own flags in a dataclass `Settings` in its file, and their values by
kind of task and protocol in `presets/<method>.toml`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import bert_tickets
from bert_tickets.errors import UserError

# The kinds of tasks, one for each training script, and their tasks.
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
TASKS = {"glue": GLUE, "squad": ("squad",), "mlm": ("mlm",)}
# modeling.parameters.PRUNABLE
Prunable = Literal["matrices", "matrices+embeddings", "matrices+biases", "layers+biases", "heads", "neurons"]
Units = Literal["heads+mlps", "heads", "mlps", "heads+neurons", "neurons"]  # kinds of units, of modeling.units
Execution = Literal["masked", "slim"]
MAX_QUESTION = 64  # tokens of a SQuAD question, as in the released code


def flag(help: str, default: Any = dataclasses.MISSING, *, affects_result: bool = True, kind: str | None = None) -> Any:
    """Make a field with a command-line flag. The run's name depends on it if `affects_result`; only scripts of `kind` have it."""
    return field(default=default, metadata={"help": help, "affects_result": affects_result, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training of one level."""

    epochs: float = flag("epochs per level", 3.0)
    batch_size: int = flag("examples per step", 32)
    grad_accum: int = flag("accumulate the gradients of N parts of each batch, to save memory", 1)
    lr: float = flag("initial learning rate; decays linearly", 2e-5)
    max_steps: int | None = flag("steps per level, instead of --epochs", None)
    weight_decay: float = flag("weight decay of AdamW, except for biases and LayerNorm", 0.0)
    adam_epsilon: float = flag("epsilon of AdamW", 1e-8)
    max_grad_norm: float = flag("clip the gradient to this norm", 1.0)
    precision: Literal["auto", "fp16", "bf16", "fp32"] = flag("auto: fp16 on CUDA, fp32 on a CPU", "auto")
    tf32: bool = flag("TensorFloat-32 matrix products in fp32 on CUDA: faster, less precise", False)
    graphs: Literal["auto", "on", "off"] = flag("CUDA graphs; auto: run eagerly where a capture fails", "auto")
    seed: int = flag("seed of the head, the order of the examples, dropout and random weights", 57)
    log_every: int = flag("log the loss every N steps", 50)
    save_minutes: float = flag("save every X minutes; SIGKILL or a power cut lose the work since", 10.0, affects_result=False)
    save_steps: int | None = flag("also write a checkpoint every N steps", None, affects_result=False)


class MethodSettings:
    """The base of a method's own settings, with the values of a method that has no such setting."""

    levels: int | None = 1  # of a run
    mask: str | None = None  # the file of a given ticket, instead of one that the method finds
    weights: str | None = None  # the file of trained weights that the method takes, instead of training the network
    kept_weights: Collection[int] = ()  # levels whose trained weights a run keeps beside the newest's
    execution: Execution = "masked"  # of a given ticket
    prunable: Prunable = "matrices"  # what the masks of the method cover
    reset_optimizer: bool | None = True  # at each level; otherwise a level keeps AdamW's state for the next

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a given flag without effect."""

    def check_kind(self, kind: str) -> None:
        """Raise `UserError` if a kind of task needs more settings."""

    def rewind_step(self, steps: int) -> int:
        """Return the step of `steps` whose weights the run saves to rewind to; 0 for none."""
        return 0

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        return []


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: a method on a task."""

    task: str = flag("the task")
    method: str = flag("the method", "imp")
    model: str = flag("a BERT checkpoint: a name on the hub or a folder", "bert-base-uncased")
    data_dir: str | None = flag("folder of the original files, instead of the hub; lt_pretrain.py: or wikimedia/wikipedia", None)
    output_dir: str = flag("folder of run directories", "runs", affects_result=False)
    protocol: Literal["paper", "released"] = flag("follow the paper's text, or its released code", "paper")
    init: str = flag("initial encoder weights: pretrained, random, or a safetensors file", "pretrained")
    max_length: int = flag("tokens per example, or per window over SQuAD's contexts; longer ones are truncated", 128)
    doc_stride: int = flag("tokens of the context between the starts of two windows", 128, kind="squad")
    limit_train: int | None = flag("use N training examples", None)
    limit_seed: Literal["fixed", "run"] = flag("draw them alike for every seed, or by the run's --seed", "fixed")
    limit_eval: int | None = flag("use the first N examples of each evaluation set", None)
    eval_steps: int | None = flag("also evaluate every N steps of a level", None)
    report: Literal["last", "best"] = flag("result in tables: a level's last evaluation, or the best of --eval-steps", "last")
    metric: str | None = flag("another metric as the score: f1, spearman, accuracy_mm (MNLI mismatched)", None, kind="glue")
    device: str = flag("auto, cpu, cuda, cuda:1", "auto", affects_result=False)
    keep_models: bool = flag("keep the model of every level as a Hugging Face folder", False, affects_result=False)
    check_metrics: bool = flag("compare the metrics with those of the evaluate package", False, affects_result=False)
    dry_run: bool = flag("print the plan of the run, and stop", False, affects_result=False)
    train: Training = field(default_factory=Training)
    settings: Any = None  # the method's own: a dataclass, and a `MethodSettings`

    @property
    def kind(self) -> str:
        """The kind of the task: glue, squad or mlm."""
        return kind_of(self.task)

    @property
    def subset_seed(self) -> int | None:
        """The seed that draws the training examples of `limit_train`; None if they are the same in every run."""
        return self.train.seed if self.limit_seed == "run" else None


COMMON = {f.name: f for part in (Config, Training) for f in dataclasses.fields(part) if f.name not in ("train", "settings")}


def kind_of(task: str) -> str:
    """Return the kind of a task. Raises `UserError` for an unknown one."""
    for kind, tasks in TASKS.items():
        if task in tasks:
            return kind
    raise UserError(f"unknown task {task}; the tasks are {', '.join(sum(TASKS.values(), ()))}")


# ---- methods ----


def methods(kind: str) -> list[str]:
    """List the methods that have a preset for this kind of task."""
    names = {path.stem for folder in bert_tickets.__path__ for path in Path(folder, "presets").glob("[!_]*.toml")}
    return sorted(name for name in names if kind in _preset(name).get("kinds", TASKS))


@functools.cache
def settings_class(method: str) -> Any:
    """Return the dataclass of a method's own flags. Raises `UserError` for an unknown method."""
    known = sorted({name for kind in TASKS for name in methods(kind)})
    if method not in known:
        raise UserError(f"unknown method {method}; the methods are {', '.join(known)}")
    name = f"bert_tickets.methods.{method}"
    found = importlib.import_module(name).Settings
    if both := sorted({f.name for f in dataclasses.fields(found)} & COMMON.keys()):
        raise TypeError(f"{name}.Settings redefines the field {both[0]}, which every method has")
    return found


def fields_of(method: str) -> dict[str, dataclasses.Field]:
    """Return all fields of a run of this method, by name: the common ones, then its own."""
    return COMMON | {f.name: f for f in dataclasses.fields(settings_class(method))}


@functools.cache
def _preset(name: str) -> dict[str, Any]:
    for folder in bert_tickets.__path__:
        path = Path(folder, "presets", f"{name}.toml")
        if path.is_file():
            return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def preset_values(method: str, kind: str, protocol: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the presets' values: fine-tuning's, then the method's; in each, those of the kind, of the protocol, and of the
    section `"--flag value"` if that flag is given."""
    values: dict[str, Any] = {}
    for name in ("_finetuning", method):
        section = _preset(name).get(kind, {})
        for key, value in (section | section.get(protocol, {})).items():
            if not isinstance(value, dict):
                values[key] = value
            elif key in {f"--{flag} {choice}" for flag, choice in (given or {}).items()}:
                values |= value
    if unknown := sorted(values.keys() - fields_of(method).keys()):
        raise KeyError(f"the preset of {method} sets {unknown[0]}, which is not a field")
    return values


def deciding_flags(method: str, kind: str, protocol: str) -> set[str]:
    """Return the flags whose values choose a section `"--flag value"` of the method's preset."""
    section = _preset(method).get(kind, {})
    found = (section | section.get(protocol, {})).items()
    return {key.split()[0].removeprefix("--").replace("-", "_") for key, value in found if isinstance(value, dict) and " " in key}


# ---- building ----


def flat(cfg: Config) -> dict[str, Any]:
    """Return all fields by name, those of `train` and `settings` included."""
    top = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in ("train", "settings")}
    return top | dataclasses.asdict(cfg.train) | dataclasses.asdict(cfg.settings)


def from_flat(values: Mapping[str, Any]) -> Config:
    """Invert `flat`. Missing fields get their defaults. Raises `UserError` for an unknown or invalid setting."""
    method = values.get("method", Config.method)
    known = fields_of(method)
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(f"this version has no setting {unknown[0]}: update bert_tickets")

    def part(of: Any) -> dict[str, Any]:
        return {f.name: values[f.name] for f in dataclasses.fields(of) if f.name in values}

    own = settings_class(method)
    return Config(**part(Config), train=Training(**part(Training)), settings=own(**part(own)))


def build(given: Mapping[str, Any]) -> Config:
    """Build a configuration: defaults, then presets, then the given values (with `task`). Raises `UserError` for bad values."""
    method, protocol = given.get("method", Config.method), given.get("protocol", Config.protocol)
    values = {**preset_values(method, kind_of(given["task"]), protocol, given), **given}
    if "epochs" in given and "max_steps" not in given:
        values["max_steps"] = None  # otherwise the preset's steps would leave --epochs without effect
    if "epochs" in given and given.get("max_steps") is not None:
        raise UserError("--epochs has no effect with --max-steps: give one of them")
    cfg = from_flat(values)
    _check(cfg)
    cfg.settings.check_given(given.keys())
    cfg.settings.check_kind(cfg.kind)
    return cfg


def _check(cfg: Config) -> None:
    values = flat(cfg)

    def need(ok: bool, name: str, what: str) -> None:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {values[name]}: {what}")

    for name, value in values.items():
        need(not isinstance(value, str) or bool(value.strip()), name, "must not be empty; is a shell variable unset?")
    for name in ("batch_size", "grad_accum", "log_every", "max_steps", "save_steps", "eval_steps", "limit_train", "limit_eval"):
        need(values[name] is None or 1 <= values[name] <= 2**48, name, "must be at least 1 (and below 2^48)")
    for name in ("epochs", "lr", "max_grad_norm", "adam_epsilon", "save_minutes"):
        need(0 < values[name] < 1e15, name, "must be above 0 and finite")
    need(cfg.train.grad_accum <= cfg.train.batch_size, "grad_accum", f"--batch-size is {cfg.train.batch_size}")
    need(cfg.report == "last" or cfg.eval_steps is not None, "report", "needs --eval-steps; otherwise a level has one evaluation")
    if cfg.limit_seed == "run":
        need(cfg.limit_train is not None, "limit_seed", "has no effect without --limit-train")
        need(cfg.task != "mlm", "limit_seed", "has no effect on mlm, which takes the first blocks of the text")
    need(cfg.max_length >= 3, "max_length", "must be at least 3")
    if cfg.task == "squad":
        context = cfg.max_length - MAX_QUESTION - 3  # tokens, with the longest question, [CLS] and two [SEP]
        need(context > 0, "max_length", f"must be at least {MAX_QUESTION + 4}: questions have up to {MAX_QUESTION} tokens")
        need(1 <= cfg.doc_stride <= context, "doc_stride", f"must be from 1 to {context}, or windows would miss text")
    need(0 <= cfg.train.weight_decay < 1, "weight_decay", "must be at least 0 and below 1")
    need(0 <= cfg.train.seed < 2**32, "seed", "must be from 0 to 2^32 - 1")
