"""A fake GPU: tensors that report `cuda:0` and hold their values on the CPU.

The whole CUDA path runs and computes with them on a machine without a GPU. Errors of a real GPU are raised: operators that mix
devices, a CPU generator for a CUDA tensor, operators without a deterministic version while one is required, and, while torch's
sync debug mode is "error", whatever waits for the device. Speed and errors inside kernels are not simulated. Attention is
computed in float32; the replay of a CUDA graph takes the step again, on the batch of the capture.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from fake_kernels import KERNELS, backward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from bert_tickets import kernels
from bert_tickets.training.cuda_graphs import Recorder

CUDA, META = 1, 14  # c10::DeviceType
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}
NOT_DETERMINISTIC = {"histc", "put_", "median", "nll_loss2d_forward"}  # of those that training could use

synchronizations: list[str] = []  # every operator so far that waited for the device
_sync_is_error = [False]


class FakeTensor(Tensor):
    """A tensor that reports `cuda:0`; `held` has its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeTensor:
        strides, offset, dtype = held.stride(), held.storage_offset(), held.dtype
        return Tensor._make_wrapper_subclass(
            cls, held.size(), strides=strides, storage_offset=offset, dtype=dtype, device=torch.device("cuda", 0)
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


def _map(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to the leaves of a type in nested tuples, lists and dictionaries; much faster than torch's tree_map."""
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
    return _map(FakeTensor, lambda x: x.held, tree)


# ---- errors of a real GPU ----


def _synchronize(why: str) -> None:
    synchronizations.append(why)
    if _sync_is_error[0]:
        raise RuntimeError(f"called a synchronizing CUDA operation: {why}")


def _check_synchronization(name: str, args: tuple, kwargs: dict) -> None:
    indexes = name in ("index", "index_put_", "index_put", "_index_put_impl_")
    by_mask = indexes and any(x.dtype == torch.bool for x in _tensors(args[1]))
    if name in SYNCHRONIZING or by_mask or (name == "repeat_interleave" and not kwargs.get("output_size")):
        _synchronize(name)


def _check_determinism(name: str, args: tuple) -> None:
    inexact = name == "cumsum" and args[0].is_floating_point()
    if torch.are_deterministic_algorithms_enabled() and (name in NOT_DETERMINISTIC or inexact):
        raise RuntimeError(f"{name} on CUDA does not have a deterministic implementation")


def _check_devices(name: str, args: tuple, on_host: list[Tensor]) -> None:
    """CUDA operators accept scalars on the CPU, and indices on the CPU, which they copy to the device."""
    if isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor) and name.endswith("_"):
        raise RuntimeError(f"{name} of a tensor on cuda:0 into one on the CPU")
    if any(x.dim() for x in on_host):
        if not (name.startswith(("index", "_index")) and isinstance(args[0], FakeTensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        _synchronize("an index on the host")


# ---- operators ----


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the held tensors, and wrap its results if they are on the GPU."""
    if torch.is_inference_mode_enabled():  # operators made of others arrive whole
        with _Mode():
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    name = func.overloadpacket.__name__
    tensors = _tensors((args, kwargs))
    on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
    on_host = [x for x in tensors if not isinstance(x, FakeTensor)]
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    to_gpu = asked in ("cuda", "meta") if asked else bool(on_gpu)  # under Meta's guard .to("cuda") asks for meta
    if name == "device":
        return torch.device("cuda", 0)
    if name in ("_to_copy", "copy_"):
        return _copy(func, args, kwargs, to_gpu)
    if on_gpu:
        _check_synchronization(name, args, kwargs)
        _check_determinism(name, args)
        _check_devices(name, args, on_host)
    if kwargs.get("generator") is not None and (on_gpu or asked == "cuda"):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if asked:
        kwargs["device"] = torch.device("cpu")
    out = KERNELS.get(name, func)(*_held(args), **_held(kwargs))
    if not to_gpu:
        return out
    out = _map(Tensor, FakeTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_gpu else out


def _copy(func: Any, args: tuple, kwargs: dict, to_gpu: bool) -> Any:
    """`_to_copy` and `copy_`, which may cross devices."""
    target, *source = args
    in_place = func.overloadpacket.__name__ == "copy_"
    from_gpu = isinstance(source[0] if in_place else target, FakeTensor)
    to_gpu = isinstance(target, FakeTensor) if in_place else to_gpu
    asynchronous = kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2])
    if from_gpu and not to_gpu:
        _synchronize("a copy to the host")
    if to_gpu and not from_gpu and not asynchronous:
        _synchronize("a blocking copy to the device")
    if in_place:
        func(*_held(args), **kwargs)
        return target
    kwargs = {key: value for key, value in kwargs.items() if key not in ("non_blocking", "pin_memory")}
    out = func(_held(target), **kwargs | {"device": torch.device("cpu")})
    return FakeTensor(out) if to_gpu else out


def _scaled_dot_product_attention(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`F.scaled_dot_product_attention`, whose CUDA dispatch a CPU build lacks: by single operators, in float32 at least."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        if not isinstance(q, FakeTensor):
            return original(q, k, v, attn_mask, dropout_p=dropout_p)
        dtype = torch.promote_types(q.dtype, torch.float32)
        inputs = [None if x is None else x.to(dtype) for x in (q, k, v, attn_mask)]
        return torch.ops.aten._scaled_dot_product_attention_math(*inputs, dropout_p)[0].to(q.dtype)

    return attend


def capture_stand_in(run: Callable[[], Tensor], device: str = "cpu") -> tuple[Callable[[], Tensor], Tensor]:
    """As `Recorder.record`: nothing is computed yet; the replay takes the step again, on the batch of the capture."""
    loss = torch.zeros((), device=device)
    return (lambda: loss.copy_(run())), loss


def _interpret(original: Callable[..., None]) -> Callable[..., None]:
    """`kernels.launch` on the held tensors, by Triton's interpreter."""

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        original(kernel, programs, *_held(arguments), **constants)

    return launch


# ---- the GPU ----


def _guards() -> Any:
    """torch's table of device guards, by device type."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


_CUDA_REPORTS = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "a fake GPU",
    "get_device_capability": (9, 0),
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "_lazy_init": None,
    "manual_seed_all": None,
    "empty_cache": None,
}


@contextlib.contextmanager
def one_gpu() -> Iterator[None]:
    """Within it torch sees one GPU, `cuda:0`, whose tensors are `FakeTensor`.

    A CPU build has no CUDA device guard; Meta's, which does nothing, takes its place.
    """
    guards = _guards()
    own, guards[CUDA] = guards[CUDA], guards[META]
    with contextlib.ExitStack() as stack:
        stack.callback(guards.__setitem__, CUDA, own or guards[META])  # tensors may outlive the context

        def replace(owner: Any, name: str, value: Any, **more: Any) -> None:
            stack.enter_context(patch.object(owner, name, value, **more))

        for name, answer in _CUDA_REPORTS.items():
            replace(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        replace(torch.cuda, "synchronize", lambda *_: _synchronize("synchronize"))
        replace(torch.cuda, "set_sync_debug_mode", lambda mode: _sync_is_error.__setitem__(0, mode in ("error", 2)))
        replace(torch.cuda, "get_sync_debug_mode", lambda: 2 if _sync_is_error[0] else 0)
        generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
        replace(torch.cuda, "default_generators", (generator,))
        replace(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
        replace(torch.cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state))
        replace(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        replace(torch._C, "_cuda_setDevice", lambda _: None, create=True)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(Recorder, "record", lambda self, run: capture_stand_in(run, "cuda"))
        replace(F, "scaled_dot_product_attention", _scaled_dot_product_attention(F.scaled_dot_product_attention))
        replace(kernels, "launch", _interpret(kernels.launch))
        replace(kernels, "usable", lambda device: False)  # the interpreter is slow: for tests that ask for it
        replace(Tensor, "backward", backward)
        replace(Tensor, "pin_memory", lambda self: self)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters keep their identity, tied ones too
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        stack.enter_context(_Mode())
        yield


# ---- tests on a fake GPU, and on a real one if there is one (`-m cuda`) ----


@contextlib.contextmanager
def sync_debug(mode: str = "error") -> Iterator[None]:
    """Set torch's sync debug mode, if there is a GPU. With `error`, operators that wait for it raise `RuntimeError`."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _why_not() -> str | None:
    """Why the fake GPU cannot be used; None if it can."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    try:
        _guards()
    except (OSError, ValueError, AttributeError):
        return "this build of torch does not export its device guards"
    return None


# values of the fixture `one_gpu`: contexts in which torch sees a GPU
FAKE = pytest.param(one_gpu, marks=pytest.mark.skipif(_why_not() is not None, reason=str(_why_not())), id="fake")
REAL = pytest.param(contextlib.nullcontext, marks=pytest.mark.cuda, id="real")
only_fake = pytest.mark.parametrize("one_gpu", [FAKE], indirect=True)
only_real = pytest.mark.parametrize("one_gpu", [REAL], indirect=True)
