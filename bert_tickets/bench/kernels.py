"""Count the kernels and the memory traffic of a training step, by kind. Needs no GPU.

A kernel is an operator that computes on the device: views and allocations are none. An operator on a list of tensors is as many
as torch's multi-tensor launches take (320 blocks of 65,536 numbers, or so many tensors). Traffic is each operator's inputs and
outputs once, as if there were no cache between two kernels. Both are a model, to hold one version of the code against another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CHUNK, BLOCKS = 65_536, 320  # numbers a block, blocks a launch, of torch's multi_tensor_apply
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # a launch, by the number of lists

KINDS = {  # an operator belongs to the first kind of which a word is in its name
    "attention": ("flash_attention", "scaled_dot_product", "softmax_backward_data", "_safe_softmax", "bmm", "_softmax"),
    "matrix products": ("mm",),
    "AdamW": ("_fused_adam",),
    "masks, norm, clip, scale": ("_foreach_norm", "_foreach_mul", "_foreach_add", "_foreach_sub", "_amp", "clamp", "linalg"),
    "casts": ("_to_copy", "_foreach_copy"),
    "gathers": ("index", "gather", "embedding"),
    "dropout": ("dropout",),
    "LayerNorm": ("layer_norm",),
    "GELU, tanh": ("gelu", "tanh"),
    "sums of bias gradients": ("sum",),
    "additions": ("add",),
}
REST = "others"
READS_ROWS = ("index_select", "embedding", "index", "gather")  # of the first tensor only what the result holds
OVERWRITES = ("copy_", "fill_", "zero_", "random_", "bernoulli_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_")


@dataclass
class Count:
    """Kernels and bytes."""

    kernels: int = 0
    bytes: int = 0


class Counter(TorchDispatchMode):
    """Within it, whatever computes on a GPU is counted, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = {kind: Count() for kind in (*KINDS, REST)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if any(x.device.type == "cuda" for x in (*inputs, *outputs)) and not _moves_nothing(func):
            name = func.overloadpacket.__name__
            count = self.kinds[next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)]
            count.kernels += _launches(args)
            count.bytes += _traffic(func, args, kwargs, inputs, outputs)
        return out

    @property
    def total(self) -> Count:
        return Count(sum(c.kernels for c in self.kinds.values()), sum(c.bytes for c in self.kinds.values()))


def count_step(loop: Callable[[int], Any]) -> dict[str, float]:
    """Kernels and gigabytes of the second step of a loop, by kind; the first makes AdamW's moments."""
    loop(0)
    with Counter() as counter:
        loop(1)
    kinds = {**counter.kinds, "together": counter.total}
    figures = {f"{kind}, kernels": float(found.kernels) for kind, found in kinds.items()}
    return figures | {f"{kind}, GB": found.bytes / 1e9 for kind, found in kinds.items()}


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _moves_nothing(func: Any) -> bool:
    name = func.overloadpacket.__name__
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
    aliases = any(result.alias_info is not None for result in func._schema.returns)
    return (aliases and not writes) or "empty" in name or name in ("device", "_unsafe_view", "is_same_size", "set_", "resize_")


def _launches(args: tuple) -> int:
    """Of an operator on lists, which all have the first list's sizes."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and len(arg) and isinstance(arg[0], Tensor)]
    if not lists or not isinstance(args[0], (list, tuple)):
        return 1
    chunks = sum(math.ceil(x.numel() / CHUNK) for x in lists[0])
    return max(math.ceil(chunks / BLOCKS), math.ceil(len(lists[0]) / TENSORS[min(5, len(lists))]))


def _size(x: Tensor) -> int:
    """Bytes of a tensor's own numbers; what is expanded is read once."""
    spread = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(spread) * x.element_size()


def _traffic(func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    name = func.overloadpacket.__name__
    written: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            written += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    if name == "_fused_adamw_" and kwargs.get("grad_scale") is None:
        written = [x for x in written if all(x is not grad for grad in args[1])]  # its kernel stores them only then
    mutated = {id(x) for x in written}
    read = [x for x in inputs if not (name in OVERWRITES and id(x) in mutated)]
    if name in READS_ROWS:
        read = [*outputs, *read[1:]]
    return sum(map(_size, (*read, *written, *(x for x in outputs if id(x) not in mutated))))
