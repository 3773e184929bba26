"""The environment of a run: versions, code and device, which may change the bits of a result."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import bert_tickets


def environment(device: str) -> dict[str, Any]:
    """Collect versions, git commit, threads and GPU. CUDA is initialized only if `device` is `cuda`."""
    packages = ["transformers", "tokenizers", "numpy", "safetensors"]
    if device == "cuda" and find_spec("triton") is not None:
        packages.append("triton")
    return {
        "git": _git(),
        "versions": {"python": platform.python_version(), "bert_tickets": bert_tickets.__version__}
        | {"torch": str(torch.__version__)}  # with the build: +cpu, +cu130
        | {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _git() -> dict[str, Any] | None:
    """Return the commit of the code, and whether it was changed since."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        answer = subprocess.run(["git", "-C", str(here), *words], capture_output=True, check=True, timeout=20).stdout
        return answer.decode(errors="replace")

    try:
        ask("ls-files", "--error-unmatch", __file__)  # installed inside somebody's repository, it is not that one
        return {"sha": ask("rev-parse", "HEAD").strip(), "dirty": bool(ask("status", "--porcelain", "-uno").strip())}
    except (OSError, subprocess.SubprocessError):
        return None
