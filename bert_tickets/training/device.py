"""The device a run computes on: which one, with what arithmetic, and what to do when its memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch
import torch.utils.deterministic as deterministic

from bert_tickets.errors import UserError


def prepare_device(asked: str, local: int = 0) -> torch.device:
    """The device for `--device`, with torch's deterministic algorithms switched on: equal runs give equal bits.

    `auto` is the GPU if there is one. `auto` and `cuda` take the GPU numbered `local`. CUDA is not initialised for `cpu`.
    Raises `UserError` for a device that does not exist.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
    except RuntimeError:
        raise UserError(f"--device {asked}: give auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        raise UserError(f"--device {asked}: this machine has no such device ({torch.cuda.device_count()} GPUs are seen)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True)
    # A debugging aid that determinism switches on, and that costs a pass over every buffer.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def set_tf32(wanted: bool, precision: str, device: torch.device) -> None:
    """Switch TensorFloat-32 products on or off, and print which they are where that matters: in fp32 on CUDA.

    Raises `UserError` where `--tf32` would have no effect.
    """
    matters = device.type == "cuda" and precision == "fp32"
    if wanted and not matters:
        raise UserError(f"--tf32 has no effect in {precision} on {device.type}: it is for --precision fp32 on CUDA")
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    if matters:
        print(f"fp32 on CUDA: TF32 is {'on' if wanted else 'off (--tf32 turns it on)'}", flush=True)


def empty_cache(device: torch.device) -> None:
    """Return what the allocator keeps to the device: after a failed allocation it is in blocks of the wrong sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc's
