"""Triton kernels for steps in half precision on a GPU, with fewer passes over memory than torch's operators take.

A step of BERT on small batches is limited by memory and by launches, not by arithmetic. Results equal torch's to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from bert_tickets.errors import first_line


@functools.cache
def usable(device: torch.device) -> bool:
    """Return whether the kernels run on the device. Prints why not, if Triton is installed and fails."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec("triton") is None:
        return False
    from bert_tickets.kernels.adamw import addresses

    try:
        addresses([torch.zeros(1, device=device)])
    except Exception as error:  # no C compiler, say
        print(f"Triton does not work here ({first_line(error)}): steps are slower, and dropout draws other numbers", flush=True)
        return False
    return True


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel as `programs` programs. `constants` are its compile-time constants, and `num_warps`."""
    kernel[(programs,)](*arguments, **constants)
