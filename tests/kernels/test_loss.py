"""The cross-entropy of logits in half precision, as torch's in float32."""

import pytest
import torch
import torch.nn.functional as F
from rounding import HALF, close

pytest.importorskip("triton")
from bert_tickets.kernels import loss


@HALF
def test_cross_entropy_equals_torchs(device, dtype):
    """With classes of no probability, more of them than a tile takes, and rows that do not count."""
    classes = loss.BLOCK + 8
    logits = (4 * torch.randn(6, classes, device=device)).to(dtype)
    logits[:, -5:] = float("-inf")
    logits.requires_grad_()
    labels = torch.tensor([0, classes - 6, -100, 5, loss.BLOCK, -100], device=device)
    found = loss.cross_entropy(logits, labels)
    expected = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(found, expected)
    (mine,), (theirs,) = (torch.autograd.grad(x * 512, logits) for x in (found, expected))
    assert mine.dtype == dtype
    assert not mine[[2, 5]].any()
    close(mine / 512, theirs / 512, dtype)
