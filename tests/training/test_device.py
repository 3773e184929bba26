"""Choosing the device: by the real `torch.cuda.set_device`, on a machine that only reports GPUs."""

import pytest
import torch

from bert_tickets.errors import UserError
from bert_tickets.training.device import prepare_device, set_tf32


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that torch reports; the list of those that were set."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    return chosen


@pytest.mark.parametrize(
    ("asked", "local_rank", "device", "numbers"),
    [("auto", 0, "cuda:0", [0]), ("cuda:1", 0, "cuda:1", [1]), ("cuda", 1, "cuda:1", [1]), ("cpu", 0, "cpu", [])],
)
def test_a_gpu_is_set_by_its_number_and_none_for_the_cpu(gpus, asked, local_rank, device, numbers):
    assert prepare_device(asked, local_rank) == torch.device(device)
    assert gpus == numbers


@pytest.mark.parametrize("asked", ["cuda:2", "abacus", "meta"])
def test_a_device_that_does_not_exist_is_refused(gpus, asked):
    with pytest.raises(UserError, match=f"--device {asked}"):
        prepare_device(asked)
    assert gpus == []


def test_tf32_is_set_and_printed_for_fp32_on_cuda_and_otherwise_refused(capsys):
    gpu = torch.device("cuda", 0)
    for wanted, setting, printed in ((False, "highest", "TF32 is off"), (True, "high", "TF32 is on")):
        set_tf32(wanted, "fp32", gpu)
        assert printed in capsys.readouterr().out
        assert torch.get_float32_matmul_precision() == setting
    set_tf32(False, "fp16", gpu)
    assert torch.get_float32_matmul_precision() == "highest"
    assert capsys.readouterr().out == ""
    for device, precision in (("cpu", "fp32"), ("cuda:0", "bf16")):
        with pytest.raises(UserError, match="--tf32 has no effect"):
            set_tf32(True, precision, torch.device(device))
