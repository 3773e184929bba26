"""How closely results in half precision agree."""

import pytest
import torch

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def close(found, expected, dtype):
    """To rounding in `dtype`; Triton's interpreter truncates bfloat16."""
    bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), rtol=bound, atol=bound)
