"""The fake GPU raises the errors of a real one. (It computes what the CPU does: test_gpu_kernels.)"""

import pytest
import torch
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


def test_nondeterministic_operators_raise_while_determinism_is_required(gpu):
    x = torch.ones(3, device=gpu)
    torch.use_deterministic_algorithms(False)
    x.cumsum(0)
    torch.use_deterministic_algorithms(True)
    x.long().cumsum(0)
    for do in (lambda: x.cumsum(0), lambda: torch.histc(x)):
        with pytest.raises(RuntimeError, match="deterministic"):
            do()
