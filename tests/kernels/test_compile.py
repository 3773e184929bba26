"""The kernels as Triton's compiler takes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bert_tickets import kernels


def test_all_kernels_compile_for_a_gpu(tmp_path):
    """With and without dropout, on examples of one tile and of several, on aligned and other widths."""
    script, folder = Path(__file__).with_name("compile_kernels.py"), Path(kernels.__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(folder.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = {name for path in folder.glob("*.py") for name in re.findall(r"launch\(\s*(_\w+)", path.read_text())}
    assert set(done.stdout.split()) == launched | {"_of_keys", "_of_queries"}
