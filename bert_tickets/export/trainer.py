"""Fine-tune a ticket with `transformers.Trainer`, its pruned weights staying zero: `load_ticket` and `TicketCallback`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bert_tickets.errors import UserError, first_line
from bert_tickets.export.sparsity import Zeros, count_zeros, covered, folder_weights, sparsity_lines
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.tokenizer import load_tokenizer

MASK = "mask.safetensors"
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # accelerate's names for processes that each hold a part of the weights
_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()  # also of trainings that an error ended


def load_ticket(folder: str | Path, head: type | None = None, **options: Any) -> tuple[Any, Any, Mask]:
    """Load an exported ticket: a model of transformers with the zeros in place, its tokenizer, and its mask.

    `head` is a class of transformers, such as `BertForTokenClassification` (default: the folder's own; with `num_labels`,
    `BertForSequenceClassification`). Its tensors are the folder's where names and shapes agree; others are drawn at random, and
    a line says so. `options` go to `from_pretrained`. Raises `UserError` for a folder that is not an exported ticket.
    """
    folder = Path(folder).expanduser()
    if (folder / "run.json").is_file():
        raise UserError(f"{folder} is a run; export one of its tickets: python scripts/export.py {folder} DIR")
    for name in ("config.json", MASK):
        if not (folder / name).is_file():
            other = "With a mask from elsewhere, load the model by transformers, and use TicketCallback(Mask.load(FILE))"
            how = f"python scripts/export.py RUN DIR writes one. {other}"
            raise UserError(f"{folder} has no {name}: it is not an exported ticket. {how}")
    mask, weights = Mask.load(folder / MASK), folder_weights(folder)
    try:
        types = {key: options.pop(key) for key in ("dtype", "torch_dtype") if key in options}  # "auto" is no field of it
        config, others = transformers.AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
        own = "BertForSequenceClassification" if "num_labels" in options else (config.architectures or ["BertModel"])[0]
        kind: Any = head or getattr(transformers, own)
        if hasattr(kind, "_model_mapping"):  # an AutoModel
            kind = kind._model_mapping[type(config)]
        if not issubclass(kind, transformers.BertPreTrainedModel):
            raise TypeError(f"{kind.__name__} is not a class of BERT such as BertForTokenClassification")
        settings = {"config": config, "state_dict": weights, "ignore_mismatched_sizes": True, **types, **others}
        model, info = kind.from_pretrained(None, output_loading_info=True, **settings)
    except Exception as error:  # the library raises a dozen types for options that do not fit
        raise UserError(f"cannot load a BERT from {folder}: {type(error).__name__}: {first_line(error)}") from None
    tokenizer = load_tokenizer(folder, str(folder), config)
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing = {name: p for name, p in model.named_parameters() if name in drawn}
    encoder = set(model.base_model.parameters())
    if lost := [name for name, p in missing.items() if p in encoder]:
        raise UserError(f"{folder} has no {lost[0]} of its config.json's shape ({len(lost)} tensors of BERT's encoder)")
    if missing:
        print(f"{folder}: the head's {', '.join(missing)} are drawn at random")
    _zero_pruned(covered(dict(model.named_parameters()), mask, str(folder)), mask, str(folder))
    return model, tokenizer, mask


class TicketCallback(transformers.TrainerCallback):
    """Train only the weights that a mask keeps, by `transformers.Trainer(..., callbacks=[TicketCallback(mask)])`.

    Gradients are multiplied by the mask in the backward pass, so that clipping, DDP, the loss scale of fp16 and the optimizer
    never see those of pruned weights: weights and AdamW's moments stay exactly zero, as in `training.step`. Weights that are
    not zero at the start are set to zero, with a line. The end prints the sparsity, counted from the weights, which `zeros`
    has by the mask's names. A pooler that the model lacks is left out.

    Raises `UserError` if the mask does not fit, if processes hold parts of the weights (FSDP, DeepSpeed), if a masked tensor is
    tied to another, and if pruned weights do not stay zero; checked after steps 1, 2, 4, 8, ... and at the end.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.zeros: dict[str, Zeros] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        params = self._params(model)
        if args.distributed_state.distributed_type in SHARDED or any(hasattr(p, "device_mesh") for p in params.values()):
            raise UserError("TicketCallback needs whole weights in each process: one process, or several by DDP")
        _check_untied(model, params)
        speak = state.is_world_process_zero
        _zero_pruned(params, self.mask, "the model" if speak else None)
        hooks = _take_hooks(model)
        for name, p in params.items():
            kept, trained = self.mask[name].to(p.device), p.requires_grad
            for moment in optimizer.state.get(p, {}).values() if optimizer is not None else ():
                if isinstance(moment, Tensor) and moment.shape == p.shape and moment.is_floating_point():
                    moment.mul_(kept)  # of a checkpoint that was trained without the mask
            if not kept.all():
                p.requires_grad_()  # a frozen one may be trained later
                hooks.append(p.register_hook(lambda grad, kept=kept: grad * kept))
                p.requires_grad_(trained)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step & (state.global_step - 1) == 0:  # few enough to cost nothing
            self._check(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        _take_hooks(model)
        self._check(model)
        if state.is_world_process_zero:
            print("the ticket's weights:", *sparsity_lines(self.zeros), sep="\n  ")

    def _params(self, model: nn.Module) -> dict[str, Tensor]:
        return covered(dict(model.named_parameters()), self.mask, "the model")

    def _check(self, model: nn.Module) -> None:
        """Count zeros. Raises `UserError` if a pruned weight is not zero."""
        self.zeros = count_zeros(self._params(model), self.mask)
        if filled := {name: zeros.filled for name, zeros in self.zeros.items() if zeros.filled}:
            name = next(iter(filled))
            if not self._params(model)[name].isfinite().all():
                raise UserError(f"{name} is not finite: the training diverged")
            what = f"{sum(filled.values()):,} weights that the mask prunes are not zero any more, such as in {name}"
            why = (
                "the optimizer moves weights without a gradient, this callback was added during the training, or another changed"
            )
            raise UserError(f"{what}: {why} them (a second TicketCallback replaces the first)")


def _take_hooks(model: nn.Module) -> list[RemovableHandle]:
    """Remove the hooks of a model, also those that an earlier training left. Returns the list for new ones."""
    for hook in _HOOKS.pop(model, []):
        hook.remove()
    return _HOOKS.setdefault(model, [])


@torch.no_grad()
def _zero_pruned(params: Mapping[str, Tensor], mask: Mask, what: str | None) -> None:
    """Set pruned weights to zero; a line says how many were not, in `what`."""
    filled = Zeros.sum(count_zeros(params, mask).values()).filled
    if filled and what:
        print(f"{what} has {filled:,} nonzero weights that the mask prunes: they are set to zero")
    for name, p in params.items():
        p.mul_(mask[name].to(p.device))


def _check_untied(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Raise `UserError` if a masked tensor is another one of the model too, such as the decoder of masked language modelling."""
    names = Counter(map(id, (p for _, p in model.named_parameters(remove_duplicate=False))))
    for name, p in params.items():
        if names[id(p)] > 1:
            why = "which the mask would prune too: untie it before training, as exported tickets for --task mlm are"
            raise UserError(f"{name} is tied to another tensor of the model, {why}")
