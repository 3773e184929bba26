"""The device of a run, and its arithmetic."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic as deterministic

from bert_tickets.errors import UserError


def prepare_device(asked: str, local_rank: int = 0) -> torch.device:
    """Return the device for `--device`, and switch on torch's deterministic algorithms: equal runs give equal bits.

    `auto` and `cuda` select GPU `local_rank`; `auto` falls back to the CPU. CUDA is not initialized for `cpu`. Raises
    `UserError` for a device that does not exist.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
    except RuntimeError:
        raise UserError(f"--device {asked}: give auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        raise UserError(f"--device {asked}: this machine has no such device (torch sees {torch.cuda.device_count()} GPUs)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True)
    # a debugging aid, on by default with deterministic algorithms, which costs a pass over every new tensor
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def set_tf32(wanted: bool, precision: str, device: torch.device) -> None:
    """Switch TensorFloat-32 matrix products on or off, and print which, if it matters: in fp32 on CUDA.

    Raises `UserError` if `--tf32` would have no effect.
    """
    matters = device.type == "cuda" and precision == "fp32"
    if wanted and not matters:
        raise UserError(f"--tf32 has no effect in {precision} on {device.type}: it is for --precision fp32 on CUDA")
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    if matters:
        print(f"fp32 on CUDA: TF32 is {'on' if wanted else 'off (--tf32 turns it on)'}", flush=True)
