"""How the Blackwell kernel weighs scores, emulated: its constants, its reference that lags, its polynomials.

Needs CuTe DSL (pip install 'gnaflex[cuda]'), whose decorators stand around the constants; no GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from gnaflex.cuda_backend.config import GROWTH

from gnaflex.trial import BUDGET, LSE_ERROR, LSE_SHARE, exactly, rounded

pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
from gnaflex.cuda_backend.sm100_softmax import LEAST, MAGIC, POLYNOMIALS, POWERS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ERROR = {"bfloat16": 7.5e-5, "float16": 2.7e-6}  # relative, of the polynomials


def polynomial(x, of):
    """2^x as the kernel computes it, in float32."""
    x = x.clamp(min=LEAST)
    shifted = x + MAGIC
    rest = x - (shifted - MAGIC)
    value = torch.full_like(x, of[-1])
    for one in of[-2::-1]:
        value = torch.addcmul(torch.tensor(one), value, rest)
    bits = value.view(torch.int32) + (shifted.view(torch.int32) << 23)
    return bits.view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_polynomials(dtype):
    x = torch.cat([torch.linspace(LEAST, 8, 400_001), torch.arange(-125.0, 9), torch.arange(-124.5, 9)])
    found = polynomial(x, POWERS[dtype]).double()
    assert ((found / x.double().exp2() - 1).abs()).max() <= ERROR[dtype]
    hidden = polynomial(torch.tensor([-math.inf, -1e30, -200.0]), POWERS[dtype])
    assert (hidden <= 2.0**LEAST * (1 + ERROR[dtype])).all()
    assert (hidden > 0).all()


def weighed(q, k, v, scale, dtype, growth, rows=128):
    """Output and log-sum-exp of some rows, tile by tile."""
    scale_log2 = scale * math.log2(math.e)
    scores = q.float() @ k.float().T
    top, total = torch.full((len(q),), -math.inf), torch.zeros(len(q))
    out = torch.zeros(len(q), v.shape[1])
    every = POLYNOMIALS["sm_100a"]
    is_polynomial = torch.arange(rows) // 2 % every == every - 1
    largest = torch.tensor(0.0)
    for first in range(0, len(k), rows):
        tile = scores[:, first : first + rows]
        grows = (torch.maximum(top, tile.amax(1)) - top) * scale_log2
        is_far = grows > growth
        change = torch.where(is_far, torch.exp2(-grows), torch.ones(()))
        top = torch.where(is_far, torch.maximum(top, tile.amax(1)), top)
        powers = tile * scale_log2 - (top * scale_log2)[:, None]
        weights = torch.where(is_polynomial, polynomial(powers, POWERS[dtype]), torch.exp2(powers))
        largest = torch.maximum(largest, weights.max())
        total = total * change + weights.sum(1)
        out = out * change[:, None] + weights.to(DTYPES[dtype]).float() @ v[first : first + rows].float()
    lse = (top * scale_log2 + total.log2()) * math.log(2)
    return (out / total[:, None]).to(DTYPES[dtype]), lse, largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0884, 1.0, 10.0])
def test_weights_are_as_good_as_plain_ones(dtype, scale):
    growth = GROWTH["sm_100a"]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(n, 64, generator=generator).to(DTYPES[dtype]) for n in (300, 1024, 1024))
        out, lse, largest = weighed(q, k, v, scale, dtype, growth)
        given = q[None, None], k[None, None], v[None, None], torch.ones(300, 1024, dtype=torch.bool), scale
        exact, exact_lse = (x[0, 0] for x in exactly(*given))
        plain = rounded(*given, growth)[0, 0]
        assert (out - exact).abs().max() <= BUDGET * (plain - exact).abs().max()
        assert ((lse - exact_lse).abs() / (LSE_ERROR + LSE_SHARE * exact_lse.abs())).max() <= 1
        assert largest <= 2**growth * (1 + 1e-4)
        if scale >= 1:
            assert largest > 2  # the reference does lag
