"""The GPU that the CUDA path is tested with refuses what a real one would, and computes what the CPU does."""

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_pretending

from bert_tickets.bench import fake_cuda as pretended

pytestmark = needs_pretending


@pytest.fixture
def gpu():
    with pretended.one_gpu():
        yield torch.device("cuda", 0)


def test_torch_sees_one_gpu_only_within(gpu):
    assert torch.cuda.is_available()
    assert torch.zeros(2).cuda().device == gpu
    assert torch.arange(3, device="cuda").device == gpu
    assert torch.zeros(2, device=gpu).new_ones(3).device == gpu
    assert torch.zeros(2).device.type == "cpu"


def test_outside_there_is_none():
    assert not torch.cuda.is_available()
    assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).device.type == "cpu"


MISTAKES = {
    "two devices": (lambda x: x + torch.ones(3), "same device"),
    "into a tensor of the CPU": (lambda x: torch.zeros(3).add_(x), "into one on the CPU"),
    "a list of two devices": (lambda x: torch._foreach_mul_([x], [torch.ones(3)]), "same device"),
    "an index on the GPU into the CPU": (lambda x: torch.ones(5)[x.long()], "same device"),
    "a CPU generator": (lambda x: x.normal_(generator=torch.Generator()), "generator"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_devices_do_not_mix(gpu, mistake):
    do, said = MISTAKES[mistake]
    with pytest.raises(RuntimeError, match=said):
        do(torch.zeros(3, device=gpu))


def test_a_scalar_of_the_cpu_may_join(gpu):
    assert (torch.ones(3, device=gpu) * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]


WAITS = {
    "item": lambda x: x.sum().item(),
    "a truth": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "into a tensor of the host": lambda x: torch.zeros(3).copy_(x),
    "a blocking copy": lambda x: torch.ones(3).to(x.device),
    "a blocking copy in place": lambda x: x.copy_(torch.ones(3)),
    "repeats of unknown size": lambda x: x.repeat_interleave(x.long()),
    "an index on the host": lambda x: x[torch.tensor([0, 1])],
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_what_makes_the_host_wait_is_refused_where_that_is_asked(gpu, wait):
    x = torch.ones(3, device=gpu)
    WAITS[wait](x)
    with pytest.raises(RuntimeError, match="the host waits"), pretended.no_waiting():
        WAITS[wait](x)


def test_what_makes_nobody_wait_is_left_in_peace(gpu):
    lens = torch.tensor([1, 2]).to(gpu)
    with pretended.no_waiting():
        moved = torch.ones(3).pin_memory().to(gpu, non_blocking=True)
        lens.repeat_interleave(lens, output_size=3)
        moved.mul_(2).masked_fill_(moved > 5, 0).index_select(0, lens)
        torch.full((), 3.0, device=gpu).fill_(2)
    assert moved.cpu().tolist() == [2, 2, 2]


def test_what_is_not_deterministic_on_a_gpu_is_refused_while_determinism_is_asked_for(gpu):
    x = torch.ones(3, device=gpu)
    torch.use_deterministic_algorithms(False)
    x.cumsum(0)
    torch.use_deterministic_algorithms(True)
    x.long().cumsum(0)
    for do in (lambda: x.cumsum(0), lambda: torch.histc(x)):
        with pytest.raises(RuntimeError, match="deterministic"):
            do()


def attended(device, dtype, p, scale):
    """Attention over padding, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 3, 9, 4, generator=generator, dtype=dtype).to(device) for _ in range(4))
    lens = torch.tensor([[9], [5]]).to(device)
    bias = torch.zeros(2, 16, dtype=dtype, device=device).masked_fill_(torch.arange(16, device=device) >= lens, float("-inf"))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, bias[:, None, None, :9], dropout_p=p, scale=scale)
    (out * upstream).sum().backward()
    return [x.detach().cpu() for x in (out, *(x.grad for x in inputs))]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_torchs_with_its_gradients(scale):
    expected = attended("cpu", torch.float32, 0.0, scale)
    with pretended.one_gpu():
        found = attended("cuda:0", torch.float32, 0.0, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_attentions_dropout_is_the_same_in_its_backward_pass(gpu):
    """Of one token that sees itself, out = v * factor, and the gradient of v is upstream * factor."""
    torch.manual_seed(3)
    q, k = torch.randn(2, 500, 2, 1, 4).cuda().unbind(0)
    v = torch.ones(500, 2, 1, 4, device=gpu, requires_grad=True)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    out.sum().backward()
    assert torch.equal(out.detach().cpu(), v.grad.cpu())
    assert 0.2 < float((out.cpu() == 0).float().mean()) < 0.3


def test_a_backward_pass_is_that_of_torchs_engine(gpu):
    def gradients(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)).to(device)
        x = torch.randn(5, 4).to(device)
        hidden = net[0](x)
        loss = F.cross_entropy(net[3](net[2](net[1](hidden)) + hidden), torch.arange(5).to(device) % 3) + (hidden**2).mean()
        loss.backward()
        return [p.grad.cpu() for p in net.parameters()]

    torch.testing.assert_close(gradients(gpu), gradients("cpu"))


def test_tied_parameters_stay_tied(gpu):
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.weight = a.weight
    torch.nn.ModuleList([a, b]).to(gpu)
    assert a.weight is b.weight
    assert a.weight.device == gpu


def test_shapes_alone_can_be_had():
    with pretended.one_gpu(numbers=False):
        net = torch.nn.Linear(4, 4).to("cuda")
        y = F.scaled_dot_product_attention(*(net(torch.ones(2, 3, 8, 4).cuda()) for _ in range(3)))
        y.sum().backward()
        assert net.weight.grad.shape == (4, 4)
        assert net.weight.grad.held.is_meta
