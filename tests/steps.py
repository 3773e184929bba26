"""Training steps on one device, to be compared bit for bit, and changed gradients."""

import torch
from fake_cuda import sync_debug

from bert_tickets.bench.baselines import packed_step


def take(case, count, recorder=None, replays=True):
    """Take steps with a copy of the network; returns the `Step` and the losses. Eager steps must not wait for the GPU.

    With `recorder` and without `replays`, steps are eager on the same padded batches.
    """
    step, take_step = packed_step(case, recorder)
    if not replays:
        step.graphs = None
    losses = []
    for i in range(count):
        torch.manual_seed(i)
        with sync_debug("error" if i and recorder is None else "default"):  # the first step and captures may wait
            losses.append(take_step(i))
    return step, torch.stack(losses)


def check_equal(one, other):
    """Compare losses and weights bit for bit."""
    (step, losses), (same, again) = one, other
    assert losses.isfinite().all()
    assert torch.equal(losses, again)
    assert [name for name, p in step.params.items() if not torch.equal(p, same.params[name])] == []


def with_gradient(loss, factor):
    """The same loss, whose gradient is multiplied by `factor(gradient)`."""
    loss = loss.clone()
    loss.register_hook(lambda grad: grad * factor(grad))
    return loss
