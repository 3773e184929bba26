"""Choosing the device: by the real `torch.cuda.set_device`, on a machine that has no GPU and only says so."""

import warnings

import pytest
import torch

import lt_glue
from bert_tickets.cli import parse
from bert_tickets.errors import UserError
from bert_tickets.training.device import out_of_memory, prepare_device, set_tf32


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that torch believes in; the list of those that were set. Everything else of `set_device` is torch's own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    return chosen


@pytest.mark.parametrize(
    ("asked", "local", "number"),
    [("auto", 0, 0), ("cuda", 0, 0), ("cuda:0", 0, 0), ("cuda:1", 0, 1), ("auto", 1, 1), ("cuda", 1, 1)],
)
def test_a_gpu_is_chosen_with_its_number(gpus, asked, local, number):
    assert prepare_device(asked, local) == torch.device("cuda", number)
    assert gpus == [number]


@pytest.mark.parametrize("asked", ["cuda:2", "cuda:-1", "abacus", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(gpus, asked):
    with pytest.raises(UserError, match=f"--device {asked}"):
        prepare_device(asked)
    assert gpus == []


def test_a_run_on_the_cpu_of_a_gpu_box_does_not_start_cuda(gpus, bert_dir, glue_dir, tmp_path, monkeypatch):
    """Nor does it ask how many GPUs there are, which alone may block a GPU in exclusive mode."""

    def started(*_: object) -> None:
        raise AssertionError("CUDA was started")

    # AdamW asks for these, and starts nothing: torch before 2.14 for the first, then for the second
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for name in ("_lazy_init", "device_count", "current_device", "get_device_name", "get_device_properties", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, started)
    monkeypatch.chdir(tmp_path)
    line = f"--task rte --model {bert_dir} --data-dir {glue_dir} --levels 2 --max-steps 2 --device cpu"
    lt_glue.main(parse("glue", None, line.split()))
    assert gpus == []


@pytest.mark.parametrize(("wanted", "setting", "said"), [(False, "highest", "TF32 is off"), (True, "high", "TF32 is on")])
def test_fp32_on_cuda_says_whether_tf32_is_on(monkeypatch, capsys, wanted, setting, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_tf32(wanted, "fp32", torch.device("cuda", 0))
    assert said in capsys.readouterr().out
    assert torch.get_float32_matmul_precision() == setting
    set_tf32(False, "fp16", torch.device("cuda", 0))
    assert torch.get_float32_matmul_precision() == "highest"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda:0", "fp16"), ("cuda:0", "bf16")])
def test_tf32_without_effect_is_refused(device, precision):
    with pytest.raises(UserError, match="--tf32 has no effect"):
        set_tf32(True, precision, torch.device(device))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_a_library_that_is_out_of_memory_in_its_own_words_is_out_of_memory(message):
    with pytest.raises(torch.OutOfMemoryError, match=r"ALLOC_FAILED|out of memory"), out_of_memory():
        raise RuntimeError(message)


def test_another_cublas_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED") as caught, out_of_memory():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")
    assert not isinstance(caught.value, torch.OutOfMemoryError)
