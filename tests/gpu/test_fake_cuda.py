"""The fake GPU raises the errors of a real one, and computes what the CPU does."""

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import only_fake, sync_debug

pytestmark = only_fake


@pytest.fixture
def gpu(one_gpu):
    with one_gpu():
        yield torch.device("cuda", 0)


def test_torch_sees_one_gpu_only_within(one_gpu):
    with one_gpu():
        assert torch.cuda.is_available()
        assert torch.zeros(2).cuda().device == torch.arange(3, device="cuda").device == torch.device("cuda", 0)
        assert torch.zeros(2).cuda().new_ones(3).device.type == "cuda"
        assert torch.zeros(2).device.type == "cpu"
    assert not torch.cuda.is_available()
    assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).device.type == "cpu"


MISTAKES = {
    "two devices": (lambda x: x + torch.ones(3), "same device"),
    "into a CPU tensor": (lambda x: torch.zeros(3).add_(x), "into one on the CPU"),
    "a list on two devices": (lambda x: torch._foreach_mul_([x], [torch.ones(3)]), "same device"),
    "a CUDA index of a CPU tensor": (lambda x: torch.ones(5)[x.long()], "same device"),
    "a CPU generator": (lambda x: x.normal_(generator=torch.Generator()), "generator"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mixed_devices_raise(gpu, mistake):
    do, message = MISTAKES[mistake]
    with pytest.raises(RuntimeError, match=message):
        do(torch.zeros(3, device=gpu))


def test_a_cpu_scalar_may_be_used(gpu):
    assert (torch.ones(3, device=gpu) * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]


SYNCHRONIZING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "a copy to the host": lambda x: x.cpu(),
    "a copy into a CPU tensor": lambda x: torch.zeros(3).copy_(x),
    "a blocking copy": lambda x: torch.ones(3).to(x.device),
    "a blocking copy in place": lambda x: x.copy_(torch.ones(3)),
    "repeats of unknown size": lambda x: x.repeat_interleave(x.long()),
    "a CPU index": lambda x: x[torch.tensor([0, 1])],
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", SYNCHRONIZING)
def test_synchronizing_operators_raise_in_sync_debug_mode_only(gpu, name):
    x = torch.ones(3, device=gpu)
    SYNCHRONIZING[name](x)
    for inference in (False, True):
        with pytest.raises(RuntimeError, match="synchronizing"), sync_debug(), torch.inference_mode(inference):
            SYNCHRONIZING[name](x)


def test_other_operators_do_not_synchronize(gpu):
    lens = torch.tensor([1, 2]).to(gpu)
    with sync_debug():
        moved = torch.ones(3).pin_memory().to(gpu, non_blocking=True)
        lens.repeat_interleave(lens, output_size=3)
        moved.mul_(2).masked_fill_(moved > 5, 0).index_select(0, lens)
        torch.full((), 3.0, device=gpu).fill_(2)
    assert moved.cpu().tolist() == [2, 2, 2]


def test_nondeterministic_operators_raise_while_determinism_is_required(gpu):
    x = torch.ones(3, device=gpu)
    torch.use_deterministic_algorithms(False)
    x.cumsum(0)
    torch.use_deterministic_algorithms(True)
    x.long().cumsum(0)
    for do in (lambda: x.cumsum(0), lambda: torch.histc(x)):
        with pytest.raises(RuntimeError, match="deterministic"):
            do()


def test_backward_equals_torchs_engine(gpu):
    def gradients(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)).to(device)
        x = torch.randn(5, 4).to(device)
        hidden = net[0](x)
        loss = F.cross_entropy(net[3](net[2](net[1](hidden)) + hidden), torch.arange(5).to(device) % 3) + (hidden**2).mean()
        loss.backward()
        return [p.grad.cpu() for p in net.parameters()]

    torch.testing.assert_close(gradients(gpu), gradients("cpu"))
