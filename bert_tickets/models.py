"""BERT with a task's head: loading, what of it may be pruned, packed attention, snapshot and rewind.

The network is Hugging Face's own, with its own parameter names; nothing is wrapped, hooked or forked. The encoder is
everything under `bert.`, pooler included; the rest is the task's head (gamma in the paper).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

from bert_tickets import UserError
from bert_tickets.batches import Batch, seeded
from bert_tickets.mask import Mask

ENCODER = "bert."
PRUNABLE = re.compile(
    r"bert\.(encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
    r"|pooler\.dense)\.weight"
)


# ---- dropout ----


class _Drop(torch.autograd.Function):
    """Zero entries with probability round(p * 2^16) / 2^16 and scale the others; four entries a 64-bit random draw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * 2**16)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = (bits.view(torch.int16)[: x.numel()] >= dropped - 2**15).view(x.shape)
        ctx.scale = 2**16 / (2**16 - dropped)
        ctx.save_for_backward(keep)
        return x.mul(keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.mul(ctx.saved_tensors[0]).mul_(ctx.scale), None


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout in training. On a CPU torch draws its Bernoulli numbers one by one, at an eighth of a training step;
    here p is rounded to a multiple of 2^-16 (0.1 to 0.100006) and the draws are 16 bits each."""
    return _Drop.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class Dropout(nn.Dropout):
    """`nn.Dropout`, drawn by `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training and self.p > 0 else input


# ---- packed attention ----


class _Pad(torch.autograd.Function):
    """Tokens [T, H] to their places in a padded [places, H], zeros elsewhere; the backward is the exact inverse."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.new_zeros(count, tokens.shape[1]).index_copy_(0, places, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The tokens [T, H] out of a padded [places, H]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: Batch | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each example of a packed batch: q, k, v [1, heads, T, d] to [1, T, heads, d].

    Only here are the tokens padded; every matrix product outside sees real tokens alone. Without `batch` it is plain
    attention within each row.
    """
    if batch is None:
        return _attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None
    _, heads, tokens, width = query.shape
    rows, longest = batch.shape

    def padded(x: Tensor) -> Tensor:  # [1, heads, T, d] -> [B, heads, L, d]
        x = x[0].transpose(0, 1).reshape(tokens, heads * width)
        x = _Pad.apply(x, batch.places, rows * longest) if batch.key_mask is not None else x
        return x.view(rows, longest, heads, width).transpose(1, 2)

    out = _attend(padded(query), padded(key), padded(value), batch.key_mask, dropout, scaling)
    out = out.transpose(1, 2).reshape(rows * longest, heads * width)
    out = _Unpad.apply(out, batch.places) if batch.key_mask is not None else out
    return out.view(1, tokens, heads, width), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    """softmax(q k^T) v on [B, heads, L, d]; `mask` is True where a key may be seen."""
    if dropout == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)
    # torch has no fused kernel with dropout on a CPU; its fallback computes this, with the slower draws.
    scores = torch.matmul(q * (q.shape[-1] ** -0.5 if scaling is None else scaling), k.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(drop(scores.softmax(-1), dropout), v)


transformers.AttentionInterface.register("packed", packed_attention)


def encode(net: nn.Module, batch: Batch) -> Tensor:
    """The encoder's last hidden states of a packed batch: [T, hidden]."""
    bert = net.bert
    hidden = bert.embeddings(
        input_ids=batch.input_ids, token_type_ids=batch.token_type_ids, position_ids=batch.position_ids
    )
    return bert.encoder(hidden, attention_mask=None, batch=batch).last_hidden_state[0]


def classify(net: nn.Module, batch: Batch) -> Tensor:
    """The logits of a sequence classifier on a packed batch: [B, labels]. Equal to the padded model's."""
    first = encode(net, batch)[batch.starts]
    return net.classifier(net.dropout(net.bert.pooler(first[:, None])))


# ---- loading ----


def load_classifier(name: str, labels: int, init: str, seed: int) -> tuple[nn.Module, Any]:
    """A BERT checkpoint under a new classification head, in fp32 on the CPU, and its tokenizer.

    `init` is what the encoder holds: `pretrained`, `random` (BERT's own initialisation, drawn by `seed`) or a
    safetensors file of weights. The head is always drawn anew, by `seed`. Raises `UserError` for what is no BERT.
    """
    transformers.logging.set_verbosity_error()  # its table of new head weights reads like a failure; ours say it
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "bert":
            raise UserError(f"{name} is a {config.model_type} model; this package prunes BERT")
        tokenizer = AutoTokenizer.from_pretrained(name)
        net, info = BertForSequenceClassification.from_pretrained(
            name,
            num_labels=labels,
            dtype=torch.float32,  # otherwise the checkpoint's own, half for some
            attn_implementation="packed",
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        where = f"the folder {name}" if Path(name).exists() else f"{name} (no such folder here, and the hub did not give it)"
        raise UserError(
            f"no BERT checkpoint to be had from {where}: {str(error).splitlines()[0]}\n"
            "Give --model a folder with config.json, model.safetensors and tokenizer.json, or the name of a model that is "
            "in the Hugging Face cache or can be downloaded."
        ) from None
    _replace_dropout(net)
    known = len(tokenizer)
    if not 100 < known <= config.vocab_size:  # a vocabulary that was not found reads as a handful of special tokens
        raise UserError(f"the tokenizer of {name} has {known} tokens and the model {config.vocab_size}: they do not fit")

    missing = {key for key in info["missing_keys"] if key.startswith(ENCODER)}
    if any(not key.startswith("bert.pooler.") for key in missing):
        raise UserError(f"{name} lacks {sorted(missing)[0]} and {len(missing) - 1} more of BERT's weights")
    draw(net, seeded(seed, "head"), [key for key, _ in net.named_parameters() if not key.startswith(ENCODER)])
    if missing:
        print(f"{name} has no pooler: its two tensors are drawn at random")
        draw(net, seeded(seed, "pooler"), sorted(missing))
    if init == "random":
        draw(net, seeded(seed, "encoder"), [key for key, _ in net.named_parameters() if key.startswith(ENCODER)])
    elif init != "pretrained":
        _fill(net, Path(init))
    return net, tokenizer


def _replace_dropout(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


@torch.no_grad()
def draw(net: nn.Module, generator: torch.Generator, names: list[str]) -> None:
    """Initialise the named parameters as BERT does: N(0, initializer_range), LayerNorm 1 and 0, biases 0."""
    for name in names:
        parameter = net.get_parameter(name)
        if name.endswith("bias"):
            parameter.zero_()
        elif "LayerNorm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(0, net.config.initializer_range, generator=generator)
    padding = net.config.pad_token_id
    if "bert.embeddings.word_embeddings.weight" in names and padding is not None:
        net.bert.embeddings.word_embeddings.weight[padding] = 0


@torch.no_grad()
def _fill(net: nn.Module, path: Path) -> None:
    """Overwrite the encoder's weights with those of a safetensors file; a head in the file is passed over."""
    if not path.is_file():
        raise UserError(f"--init {path}: give pretrained, random, or a file of weights; there is no such file")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None
    encoder = encoder_weights(net)
    known = {name: tensor for name, tensor in weights.items() if name in encoder}
    for name, tensor in known.items():
        if tensor.shape != encoder[name].shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in {path} and {tuple(encoder[name].shape)} in the model")
        encoder[name].copy_(tensor)
    if not known:
        raise UserError(f"{path} holds none of the encoder's weights (names such as {next(iter(encoder))})")
    if len(known) < len(encoder):
        print(f"{path} sets {len(known)} of the encoder's {len(encoder)} tensors; the others stay pre-trained")


# ---- the weights of a ticket ----


def encoder_weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """The encoder's parameters by name, pooler included: theta."""
    return {name: parameter for name, parameter in net.named_parameters() if name.startswith(ENCODER)}


def prunable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices a mask covers: six a layer and the pooler's (73 and 85,524,480 weights in BERT-base)."""
    return {name: parameter for name, parameter in net.named_parameters() if PRUNABLE.fullmatch(name)}


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, on the CPU. A `state_dict` would alias the live ones and follow them."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in net.named_parameters()}


@torch.no_grad()
def rewind(net: nn.Module, theta: Mapping[str, Tensor], mask: Mask, *, head: bool = True) -> None:
    """Set the encoder to mask * theta, and with `head` the head to gamma as it was then."""
    for name, parameter in net.named_parameters():
        if head or name.startswith(ENCODER):
            parameter.copy_(theta[name])
    mask.apply(prunable(net))


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names and values."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
