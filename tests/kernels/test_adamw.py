"""AdamW with masks and clipping, as torch's on masked and clipped gradients."""

import pytest
import torch
from rounding import HALF

pytest.importorskip("triton")
from bert_tickets.kernels.adamw import BLOCK
from bert_tickets.training.masked_adamw import MaskedAdamW


@HALF
def test_masked_adamw_equals_torchs_on_masked_gradients(device, dtype):
    """Some gradients are in half precision, one of them within another tensor."""
    shapes = [(3, BLOCK), (7,), (BLOCK,), (2, BLOCK + 1), (5, 5)]
    params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    kept = {i: (torch.rand(shapes[i]) < 0.5).to(device, torch.uint8) for i in (0, 3)}
    with torch.no_grad():
        for i, mask in kept.items():
            params[i].mul_(mask)
    copies = [p.detach().clone().requires_grad_() for p in params]

    def groups(params):
        return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]

    lr = torch.tensor(1e-2, device=device)
    ours = MaskedAdamW(groups(params), {params[i]: mask for i, mask in kept.items()}, dtype, lr, 1e-8)
    theirs = torch.optim.AdamW(groups(copies), lr=1e-2, eps=1e-8)
    for step in range(6):
        skip = step == 2
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            grad = torch.randn_like(p)
            if i in (0, 1, 3):
                p.grad_dtype = None
                p.grad = torch.cat([torch.zeros(3, device=device), 8 * grad.flatten()]).to(dtype)[3:].view(p.shape)
                grad = p.grad.float() / 8
            else:
                p.grad = 8 * grad
            q.grad = grad * kept[i] if i in kept else grad
        if step >= 4:  # a tensor that the loss does not depend on
            params[4].grad = copies[4].grad = None
        if skip:
            params[0].grad[0, 0] = float("nan")
        assert ours.clip(40.0 if step % 2 else 1e9, torch.tensor(8.0, device=device)) == skip
        ours.step()
        if not skip:
            norm = torch.nn.utils.clip_grad_norm_(copies, 40.0 if step % 2 else 1e9)
            assert norm > 40
            theirs.step()
    for i, (p, q) in enumerate(zip(params, copies, strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert ours.state[p]["step"] == theirs.state[q]["step"] == (5 if i < 4 else 3)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], rtol=1e-5, atol=1e-6)
            if i in kept:
                assert not ours.state[p][name][kept[i] == 0].any()
        if i in kept:
            assert not p[kept[i] == 0].any()


def test_the_steps_of_more_tensors_than_a_block_are_counted(device):
    params = [torch.ones(1, device=device).requires_grad_() for _ in range(300)]
    optimizer = MaskedAdamW([{"params": params}], {}, torch.float16, torch.tensor(1e-2, device=device), 1e-8)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.clip(1.0)
    assert {float(optimizer.state[p]["step"]) for p in params} == {1.0}


def test_a_step_with_an_infinite_gradient_is_not_taken_in_fp16(device):
    """With a loss scale; without one, as in bf16, it is taken."""
    for value, scale in (("inf", 4.0), ("nan", 4.0), ("nan", None)):
        p = torch.ones(10, device=device).requires_grad_()
        optimizer = MaskedAdamW([{"params": [p]}], {}, torch.float16, torch.tensor(1e-2, device=device), 1e-8)
        p.grad = torch.tensor([1.0] * 9 + [float(value)], device=device)
        assert optimizer.clip(1.0, None if scale is None else torch.tensor(scale, device=device)) == (scale is not None)
        optimizer.step()
        assert torch.equal(p, torch.ones_like(p)) == (scale is not None)
        assert optimizer.state[p]["step"] == (scale is None)
