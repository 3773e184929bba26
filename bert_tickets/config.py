"""What a run is: frozen dataclasses, the presets that fill them, and the run's name.

Imports neither torch nor transformers, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bert_tickets import UserError
from bert_tickets.schedule import decay_span, fractions, linear_decay, most_levels

PRESETS = Path(__file__).parent / "presets"
QUESTION = 64  # tokens of a SQuAD question at most, as in the released code


def flag(help: str, default: Any = dataclasses.MISSING, *, identity: bool = True, only: str | None = None) -> Any:
    """A field and its flag. `identity=False`: the result does not depend on it, so the run's name does not either.
    `only` is the one preset whose script has the flag; on the others it could do nothing."""
    return field(default=default, metadata={"help": help, "identity": identity, "only": only})


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained on a task, once."""

    epochs: float = flag("passes over the training set, of every level", 3.0)
    batch_size: int = flag("examples a step", 32)
    lr: float = flag("initial learning rate; decays linearly", 2e-5)
    max_steps: int | None = flag("steps of every level, instead of --epochs", None)
    weight_decay: float = flag("AdamW's, on all but biases and LayerNorm", 0.0)
    adam_epsilon: float = flag("AdamW's epsilon", 1e-8)
    max_grad_norm: float = flag("clip the gradient to this norm", 1.0)
    precision: Literal["auto", "fp16", "bf16", "fp32"] = flag("auto: fp16 on CUDA, fp32 on a CPU", "auto")
    tf32: bool = flag("CUDA, fp32: matrix products in TensorFloat-32, faster and of 10 bits of mantissa", False)
    graphs: Literal["auto", "on", "off"] = flag("CUDA: replay steps as CUDA graphs; auto: eagerly where that fails", "auto")
    seed: int = flag("fixes the head, the order of the examples, dropout and random weights", 57)
    log_every: int = flag("read the loss every so many steps; the windows of the loss curve", 50)
    save_minutes: float = flag("write a checkpoint every so many minutes", 10.0, identity=False)
    save_steps: int | None = flag("write one every so many steps as well", None, identity=False)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: a ticket found (or, with `mask`, trained) on a task."""

    task: str = flag("the task")
    model: str = flag("a BERT checkpoint: a name on the hub or a folder", "bert-base-uncased")
    data_dir: str | None = flag("folder of the original files, not the hub; or, to lt_pretrain.py, wikimedia/wikipedia", None)
    output_dir: str = flag("where run directories are made", "runs", identity=False)
    protocol: Literal["paper", "released"] = flag(
        "do what the paper says, or what the released code does; with --rewind none given: its standard pruning", "paper"
    )
    init: str = flag("pretrained, random, or a file of weights (safetensors): what the ticket starts from", "pretrained")
    mask: str | None = flag("train this ticket once instead of finding one: a mask file, or a released mask.pt", None)
    levels: int = flag("how many sparsities, the dense network counted; ten, or fewer where --rate allows no more", 10)
    rate: float = flag("share of the weights a level removes", 0.1)
    schedule: Literal["linear", "geometric"] = flag("--rate of the original weights, or of what is left", "linear")
    scope: Literal["global", "tensor"] = flag("rank the weights together, or within each matrix", "global")
    rewind: str = flag("weights a level starts from: 0, a step (500) or share (5%) of training, or none (standard pruning)", "0")
    rewind_head: bool = flag("rewind the task's head with the encoder", True)
    prune_first: bool = flag("level 0 is for comparison: level 1 prunes the pre-trained weights and starts from them", False)
    decay: Literal["level", "run", "once"] = flag(
        "the learning rate decays to zero in each level; restarts a decay over all levels in each (run); or decays once over all",
        "level",
    )
    reset_optimizer: bool | None = flag("a new AdamW each level; unless given: yes, but not with --rewind none", None)
    max_length: int = flag("tokens of an example, or of a window over SQuAD's contexts; the rest is cut", 128)
    doc_stride: int = flag("tokens of the context from where a window begins to where the next does", 128, only="squad")
    limit_train: int | None = flag("use so many training examples, the same ones for every seed", None)
    limit_eval: int | None = flag("use the first so many examples of each evaluation set", None)
    device: str = flag("auto, cpu, cuda, cuda:1", "auto", identity=False)
    keep_models: bool = flag("keep every level's model as a Hugging Face folder", False, identity=False)
    check_metrics: bool = flag("compare the metrics with the evaluate package's", False, identity=False)
    dry_run: bool = flag("print what would run, and stop", False, identity=False)
    train: Training = field(default_factory=Training)

    @property
    def resets_optimizer(self) -> bool:
        return self.rewind != "none" if self.reset_optimizer is None else self.reset_optimizer

    @property
    def fractions(self) -> list[float]:
        """The share of what is left that goes before each level."""
        return fractions(self.levels, self.rate, self.schedule)

    def learning_rate(self, level: int, steps: int) -> Callable[[int], float]:
        """The learning rate by the step of a level of so many steps."""
        if self.mask is not None:
            return linear_decay(self.train.lr, steps)
        most = most_levels(self.rate, self.schedule)
        most = 10 if math.isinf(most) else int(most)  # whatever --levels asks for: a shorter run is the beginning of the whole
        span, number = decay_span(self.decay, level, self.levels, most, self.prune_first)
        return linear_decay(self.train.lr, steps, span, number)

    def rewind_step(self, steps: int) -> int:
        """The step of `steps` whose weights each level starts from; 0 also for `none`, where nothing is rewound."""
        if self.rewind == "none":
            return 0
        percent = self.rewind.endswith("%")
        step = round(float(self.rewind[:-1]) / 100 * steps) if percent else int(self.rewind)
        if step >= steps:
            raise UserError(f"--rewind {self.rewind} is step {step}, and a level has {steps} steps: nothing would be trained")
        return step


FIELDS = {f.name: f for part in (Config, Training) for f in dataclasses.fields(part) if f.name != "train"}


def offered(preset: str) -> dict[str, dataclasses.Field]:
    """The fields that are flags on a preset's script: one for its task only where there is a choice."""
    absent = {"task"} if len(tasks(preset)) == 1 else set()
    return {name: f for name, f in FIELDS.items() if name not in absent and f.metadata["only"] in (None, preset)}


def flat(cfg: Config) -> dict[str, Any]:
    """Every field by its flag's name."""
    values = dataclasses.asdict(cfg)
    return values | values.pop("train")


def of_flat(values: Mapping[str, Any]) -> Config:
    """The inverse of `flat`; what is not given has its default. Raises `UserError` for a setting that is none."""
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise UserError(f"this version does not know the setting {unknown[0]}: update bert_tickets")
    training = {name: value for name, value in values.items() if name in Training.__dataclass_fields__}
    others = {name: value for name, value in values.items() if name not in training}
    return Config(**others, train=Training(**training))


def build(preset: str, given: dict[str, Any]) -> Config:
    """Defaults, then the preset of the protocol, then what was given. Raises `UserError` for values out of range."""
    protocol = given.get("protocol", FIELDS["protocol"].default)
    values = preset_values(preset, protocol, given.get("rewind")) | given
    if "epochs" in given and "max_steps" not in given:
        values["max_steps"] = None  # a preset's steps would make the flag do nothing
    _check_effect(given, values.get("rewind", Config.rewind))
    if "levels" not in values:
        values["levels"] = min(10, most_levels(values.get("rate", Config.rate), values.get("schedule", Config.schedule)))
    if "rewind" in given:
        values["rewind"] = _plain_rewind(given["rewind"])  # 0%, 00 and 0 are one run
    cfg = of_flat(values)
    _check(cfg)
    return cfg


def _read_preset(name: str) -> dict[str, Any]:
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def tasks(preset: str) -> list[str]:
    """The tasks a preset is for."""
    return _read_preset(preset)["tasks"]


def preset_of(task: str) -> str:
    """The preset that a task belongs to. Raises `UserError` where there is no such task."""
    for path in PRESETS.glob("*.toml"):
        if task in tasks(path.stem):
            return path.stem
    raise UserError(f"this version does not know the task {task}: update bert_tickets")


def preset_values(name: str, protocol: str, rewind: str | None = None) -> dict[str, Any]:
    """What the preset sets under a protocol, and for `--rewind` where that is given."""
    preset = _read_preset(name)
    values = preset[protocol] | preset.get(f"{protocol} --rewind {rewind}", {})
    unknown = set(values) - set(FIELDS)
    if unknown:
        raise KeyError(f"{name}.toml sets unknown fields {sorted(unknown)}")
    return values


def set_by_rewind(config: Mapping[str, Any], differs: Mapping[str, Any]) -> set[str]:
    """Of a run's settings that differ from the protocol's preset, those that the preset itself sets for its `--rewind`."""
    if "rewind" not in differs:
        return set()
    values = preset_values(preset_of(config["task"]), config["protocol"], config["rewind"])
    return {name for name in differs if name != "rewind" and name in values and config[name] == values[name]}


def _plain_rewind(text: str) -> str:
    """The shortest way to write the same; what cannot be read stays, for `_check` to refuse."""
    try:
        if text == "none":
            return text
        share = float(text[:-1]) if text.endswith("%") else None
        return str(int(text)) if share is None else f"{share:.15g}%" if share else "0"
    except ValueError:
        return text


FINDING = ("levels", "rate", "schedule", "scope", "rewind", "rewind_head", "prune_first", "decay", "reset_optimizer")


def _check_effect(given: dict[str, Any], rewind: str) -> None:
    """Refuse a flag that could do nothing: its user would believe it did."""
    idle: dict[str, str] = {}
    if given.get("mask") is not None:
        idle = dict.fromkeys(FINDING, "belongs to finding a ticket, and --mask trains a given one")
        idle["rewind"] += " (to start it from later weights: --init runs/.../rewind.safetensors)"
    elif rewind == "none":
        idle["rewind_head"] = "has no meaning with --rewind none"
    if given.get("max_steps") is not None:
        idle["epochs"] = "has no effect beside --max-steps: give one of them"
    for name, why in idle.items():
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} {why}")


def _check(cfg: Config) -> None:
    def need(ok: bool, name: str, what: str) -> None:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {flat(cfg)[name]}: {what}")

    for name in ("model", "data_dir", "output_dir", "init", "mask", "device"):
        if (value := flat(cfg)[name]) is not None:
            need(bool(value.strip()), name, "it is empty; is a variable of your shell not set?")
            need(all(len(part.encode(errors="replace")) < 256 for part in value.split("/")), name, "no file has so long a name")
    for name in ("batch_size", "log_every", "max_steps", "save_steps", "limit_train", "limit_eval", "levels"):
        if (value := flat(cfg)[name]) is not None:
            need(1 <= value <= (1000 if name == "levels" else 2**48), name, "at least 1 is needed" if value < 1 else "too many")
    for name in ("epochs", "lr", "max_grad_norm", "adam_epsilon", "save_minutes"):
        need(0 < flat(cfg)[name] < 1e15, name, "a number above 0 is needed, and none beyond all bounds")
    need(0 < cfg.rate < 1, "rate", "a share between 0 and 1 is needed")
    if cfg.mask is None:
        _ = cfg.fractions  # a level beyond what is left is met now
    need(cfg.max_length >= 3, "max_length", "an example has three tokens at least")
    if cfg.task == "squad":
        room = cfg.max_length - QUESTION - 3  # of the context, beside the longest question, [CLS] and two [SEP]
        need(room > 0, "max_length", f"SQuAD's windows need {QUESTION + 4} tokens at least, as questions have up to {QUESTION}")
        what = f"from 1 to {room} is needed: at --max-length {cfg.max_length} windows further apart could miss text"
        need(1 <= cfg.doc_stride <= room, "doc_stride", what)
    need(0 <= cfg.train.weight_decay < 1, "weight_decay", "a number from 0 to below 1 is needed")
    need(0 <= cfg.train.seed < 2**32, "seed", "a whole number from 0 to 2^32 - 1 is needed")
    try:
        share = float(cfg.rewind[:-1]) if cfg.rewind.endswith("%") else None
        step = int(cfg.rewind) if share is None and cfg.rewind != "none" else 0
    except ValueError:
        share, step = None, -1
    need((step >= 0) if share is None else 0 <= share < 100, "rewind", "0, a step, a share such as 5%, or none is needed")


# ---- the run's name ----


def identity(cfg: Config, preset: str) -> dict[str, Any]:
    """What differs from the protocol's preset and bears on the result; files count by their content."""
    standard = build(preset, {"task": cfg.task, "protocol": cfg.protocol})
    values, plain = (flat(each) | {"reset_optimizer": each.resets_optimizer} for each in (cfg, standard))
    differs = {name: value for name, value in values.items() if FIELDS[name].metadata["identity"] and value != plain[name]}
    for name in ("mask", "init"):
        if name in differs and Path(differs[name]).is_file():
            try:
                at = Path(differs[name]).stat()
                differs[name] = "sha256:" + _sha256(differs[name], at.st_ino, at.st_size, at.st_mtime_ns)
            except OSError as error:
                raise UserError(f"cannot read {differs[name]}: {error.strerror}") from None
    for name in ("data_dir", "model"):
        if name in differs and Path(differs[name]).is_dir():
            differs[name] = str(Path(differs[name]).resolve())
    return differs


@functools.cache
def _sha256(path: str, *version: int) -> str:
    """The digest of a file's content, read once a `version` of it: a sweep names hundreds of runs by the same few files."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_name(cfg: Config, preset: str) -> str:
    """`<task>-<what>-s<seed>-<hash>`: the same configuration has the same name, another one another name."""
    what = "ticket" if cfg.mask else "imp"
    if cfg.protocol != "paper":
        what += f"-{cfg.protocol}"
    text = json.dumps({"task": cfg.task, "protocol": cfg.protocol, **identity(cfg, preset)}, sort_keys=True)
    return f"{cfg.task}-{what}-s{cfg.train.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
