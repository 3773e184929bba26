"""A stand-in for the capture of a step as a CUDA graph, for machines without a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor


def capture_stand_in(run: Callable[[], Tensor], device: str = "cpu") -> tuple[Callable[[], Tensor], Tensor]:
    """As `Recorder.record`: nothing is computed yet; the replay takes the step again, on the batch of the capture."""
    loss = torch.zeros((), device=device)
    return (lambda: loss.copy_(run())), loss
