"""A GPU that is not there: tensors that report `cuda:0` and hold their numbers on the CPU.

With them the whole CUDA path runs without a GPU, and computes; or has shapes alone, to count what it does. It
refuses what a GPU would: an operator that mixes devices, a CPU generator for a tensor on the GPU, an operator without a
deterministic version while one is asked for; and, within `no_waiting`, whatever makes the host wait for the device. It cannot
show speed, a kernel's own errors, or CUDA graphs. Attention is FlashAttention or torch's memory-efficient kernel, computed in
float32.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from bert_tickets.bench.fake_kernels import KERNELS, backward

CUDA, META = 1, 14  # c10::DeviceType
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}
NOT_DETERMINISTIC = {"histc", "put_", "median", "nll_loss2d_forward"}  # of those that a training could use
EFFICIENT = "_scaled_dot_product_efficient_attention"


class Pretended(Tensor):
    """A tensor that says it is on `cuda:0`; `held` has its numbers, on the CPU, or its shape, on `meta`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cuda", 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


# ---- what a GPU refuses ----

_waiting_refused = [False]
waited: list[str] = []  # what the host has waited for


@contextlib.contextmanager
def no_waiting(refused: bool = True) -> Iterator[None]:
    """Within it an operator for which the host would wait for the device raises `RuntimeError`, as under
    `torch.cuda.set_sync_debug_mode("error")`; or, within another one, no longer does."""
    before, _waiting_refused[0] = _waiting_refused[0], refused
    try:
        yield
    finally:
        _waiting_refused[0] = before


def _wait(why: str) -> None:
    waited.append(why)
    if _waiting_refused[0]:
        raise RuntimeError(f"the host waits for the device: {why}")


def _map(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of tuples, lists and dictionaries with `function` applied to what is of `kind`; torch's own is slower by far."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_map(kind, function, x) for x in tree])
    return {key: _map(kind, function, x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(Tensor, found.append, tree)
    return found


def _held(tree: Any) -> Any:
    return _map(Pretended, lambda x: x.held, tree)


def _check_waiting(name: str, args: tuple, kwargs: dict) -> None:
    by_mask = name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(
        x.dtype == torch.bool for x in _tensors(args[1])
    )
    if name in WAITING or by_mask or (name == "repeat_interleave" and not kwargs.get("output_size")):
        _wait(name)


def _check_determinism(name: str, args: tuple) -> None:
    inexact = name == "cumsum" and args[0].is_floating_point()
    if torch.are_deterministic_algorithms_enabled() and (name in NOT_DETERMINISTIC or inexact):
        raise RuntimeError(f"{name} on CUDA does not have a deterministic implementation")


def _check_devices(name: str, args: tuple, on_host: list[Tensor]) -> None:
    """Scalars of the CPU may join an operator on the GPU, and indices into a tensor on the GPU, which are copied there."""
    if isinstance(args[0], Tensor) and not isinstance(args[0], Pretended) and name.endswith("_"):
        raise RuntimeError(f"{name} of a tensor on cuda:0 into one on the CPU")
    if any(x.dim() for x in on_host):
        if not (name.startswith(("index", "_index")) and isinstance(args[0], Pretended)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        _wait("an index on the host")


# ---- operators ----

_place = ["cpu"]  # of what is held


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the numbers held, and say where its result is."""
    name = func.overloadpacket.__name__
    every = _tensors((args, kwargs))
    on_gpu = [x for x in every if isinstance(x, Pretended)]
    on_host = [x for x in every if not isinstance(x, Pretended)]
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    to_gpu = asked in ("cuda", "meta") if asked else bool(on_gpu)  # Meta's guard turns .to("cuda") into meta
    if name == "device":
        return torch.device("cuda", 0)
    if name in ("_to_copy", "copy_"):
        return _copy(func, args, kwargs, to_gpu)
    if not on_gpu and (asked == "meta" or any(x.is_meta for x in on_host)):
        return func(*args, **kwargs)
    if on_gpu:
        _check_waiting(name, args, kwargs)
        _check_determinism(name, args)
        _check_devices(name, args, on_host)
    if kwargs.get("generator") is not None and (on_gpu or asked == "cuda"):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if asked:
        kwargs["device"] = torch.device(_place[0] if to_gpu else "cpu")
    kernel = KERNELS.get(name, func) if _place[0] == "cpu" else func
    out = kernel(*_held(args), **_held(kwargs))
    if not to_gpu:
        return out
    out = _map(Tensor, Pretended, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_gpu else out


def _copy(func: Any, args: tuple, kwargs: dict, to_gpu: bool) -> Any:
    """`_to_copy` and `copy_`: the ways from one device to the other."""
    written, *source = args
    in_place = func.overloadpacket.__name__ == "copy_"
    here = isinstance(source[0] if in_place else written, Pretended)
    there = isinstance(written, Pretended) if in_place else to_gpu
    asynchronous = kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2])
    if here and not there:
        _wait("a copy to the host")
    if there and not here and not asynchronous:
        _wait("a blocking copy to the device")
    if in_place:
        func(*_held(args), **kwargs)
        return written
    kept = {key: value for key, value in kwargs.items() if key not in ("non_blocking", "pin_memory")}
    out = func(_held(written), **kept | {"device": torch.device(_place[0] if there else "cpu")})
    return Pretended(out) if there else out


def _scaled_dot_product_attention(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's choice on CUDA, which a CPU build does not make: its memory-efficient kernel, but in double precision."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        if not isinstance(query, Pretended):
            return plain(query, key, value, attn_mask, dropout_p=dropout_p, scale=scale)
        if query.dtype == torch.float64:
            return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, False, scale=scale)[
                0
            ]
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf"))
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
            longest = attn_mask.shape[-1]
            if any(stride % 8 for stride in attn_mask.stride()[:-1]):
                attn_mask = F.pad(attn_mask, (0, -longest % 8))[..., :longest]
            attn_mask = attn_mask.expand(*query.shape[:3], longest)
        kernel = getattr(torch.ops.aten, EFFICIENT)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return kernel(query, key, value, attn_mask, True, dropout_p, False, scale=scale)[0]

    return attend


# ---- the GPU ----


def why_not() -> str | None:
    """Why this torch cannot pretend, if it cannot."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    try:
        _guards()
    except (OSError, ValueError, AttributeError):
        return "this build of torch does not show its device guards"
    return None


def _guards() -> Any:
    """torch's table of device guards, by the type of device."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


@contextlib.contextmanager
def one_gpu(numbers: bool = True) -> Iterator[None]:
    """Within it torch sees one GPU, `cuda:0`, whose tensors are `Pretended`; without `numbers` they have a shape alone.

    CUDA's device guard, which a CPU build lacks, is Meta's as long, which does nothing.
    """
    guards = _guards()
    _place[0] = "cpu" if numbers else "meta"
    own = guards[CUDA]
    guards[CUDA] = guards[META]
    says = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "a pretended GPU",
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
    }
    ignores = ("_lazy_init", "manual_seed_all", "empty_cache")
    with contextlib.ExitStack() as stack:
        stack.callback(guards.__setitem__, CUDA, own or guards[META])  # tensors may live on

        def replace(owner: Any, name: str, value: Any, **more: Any) -> None:
            stack.enter_context(patch.object(owner, name, value, **more))

        for name, answer in says.items():
            replace(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        for name in ignores:
            replace(torch.cuda, name, lambda *_, **__: None)
        replace(torch.cuda, "synchronize", lambda *_: _wait("synchronize"))
        replace(torch.cuda, "set_sync_debug_mode", lambda mode: _waiting_refused.__setitem__(0, mode in ("error", 2)))
        replace(torch.cuda, "get_sync_debug_mode", lambda: 2 if _waiting_refused[0] else 0)
        generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
        replace(torch.cuda, "default_generators", (generator,))
        replace(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
        replace(torch.cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state))
        replace(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        replace(torch._C, "_cuda_setDevice", lambda _: None, create=True)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(F, "scaled_dot_product_attention", _scaled_dot_product_attention(F.scaled_dot_product_attention))
        replace(Tensor, "backward", backward)
        replace(Tensor, "pin_memory", lambda self: self)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects they are, tied ones too
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        stack.enter_context(_Mode())
        yield
