"""Random factors of dropout within kernels."""

from __future__ import annotations

import triton
import triton.language as tl


def rounded(p: float) -> int:
    """Return p in units of 2^-16, as kernels take it: a draw has 16 random bits."""
    return round(p * 2**16)


ROUNDS = tl.constexpr(7)  # of Philox4x32: the fewest that pass all statistical tests (Salmon et al. 2011, table 2)


@triton.jit
def inverse(DROPPED: tl.constexpr):
    """The factor of what is kept, so that the mean stays."""
    return 65536 / (65536 - DROPPED)


@triton.jit
def factors(seed, first, DROPPED: tl.constexpr, COUNT: tl.constexpr):
    """Draw COUNT factors: 0 with probability DROPPED / 2^16, else its inverse. Draws number 8 * first and on, of this seed."""
    if DROPPED == 0:
        return tl.full((COUNT,), 1.0, tl.float32)
    a, b, c, d = tl.randint4x(tl.load(seed), first + tl.arange(0, COUNT // 8), ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (COUNT // 2,))
    draws = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (COUNT,))
    return tl.where(draws < DROPPED, 0.0, inverse(DROPPED))
