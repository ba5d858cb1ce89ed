"""What text tokens, prompts and biases add: to a mask's making, to attention under it, to compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch._dynamo.utils import counters

import gnaflex

from .cpu_attention import all_full, tensors
from .measure import Row, fresh_process, interleaved, ratios, row

HUNYUAN = "(30, 48, 80), (18, 24, 24)"
CASES = [  # what, arguments of block_mask, its extra tokens
    ("HunyuanVideo 30x48x80 stride 16x8x8, tile-major",
     f"{HUNYUAN}, (16, 8, 8), q_tile=(2, 8, 8)", "suffix=256"),
    ("HunyuanVideo 30x48x80 stride 1, tile-major", f"{HUNYUAN}, q_tile=(2, 8, 8)", "suffix=256"),
    ("HunyuanVideo 30x48x80 stride 16x8x8, row-major", f"{HUNYUAN}, (16, 8, 8)", "suffix=256"),
    ("FLUX 64x64 window 32x32, row-major", "(64, 64), (32, 32)", "prefix=512"),
    ("FLUX 256x256 window 80x80 stride 16x16, row-major", "(256, 256), (80, 80), (16, 16)", "prefix=512"),
    ("FLUX 256x256 window 80x80 stride 16x16, tile-major",
     "(256, 256), (80, 80), (16, 16), q_tile=(16, 8)", "prefix=512"),
]  # fmt: skip
BOTH = """
import time, torch, sympy, gnaflex
def plain(): return gnaflex.block_mask({arguments}, device="cpu")
def joint(): return gnaflex.block_mask({arguments}, {extra}, device="cpu")
def took(call):
    start = time.perf_counter(); bm = call(); return 1e3 * (time.perf_counter() - start)
first = took({first})
for call in (plain, joint): took(call)
times = [(took(plain), took(joint)) for _ in range(15)]
plain_ms, joint_ms = (sorted(column)[7] for column in zip(*times))
print(first, plain_ms, joint_ms, sorted(b / a for a, b in times)[7])
"""


def measure(quick: bool) -> Iterator[Row]:
    """Rows in order; ``quick`` takes fewer runs."""
    runs = 2 if quick else 5
    for what, arguments, extra in CASES:
        yield from making(what, arguments, extra, runs)
    with torch.no_grad():
        yield from mask_cost(3 if quick else 9)
        yield graphs()


def making(what: str, arguments: str, extra: str, runs: int) -> Iterator[Row]:
    """The mask with and without its text, in fresh processes; later calls in turn."""
    code = {first: BOTH.format(arguments=arguments, extra=extra, first=first) for first in ("plain", "joint")}
    found: dict[str, list[list[float]]] = {first: [] for first in code}
    for _ in range(runs):
        for first, lines in code.items():
            found[first].append(fresh_process(lines))
    for first, name in (("plain", "without text"), ("joint", extra)):
        yield row(f"{what}, {name}: first call", [one[0] for one in found[first]], "ms")
    later = found["plain"] + found["joint"]
    yield row(f"{what}, without text: later calls", [one[1] for one in later], "ms")
    yield row(f"{what}, {extra}: later calls", [one[2] for one in later], "ms")
    yield row(f"{what}, {extra}: over the mask without", [one[3] for one in later], "x", 1.5, 1.2)


def mask_cost(rounds: int) -> Iterator[Row]:
    """Compiled attention under a joint mask against the same lists all declared full."""
    for order, tile in (("row-major", None), ("tile-major", (2, 8, 8))):
        for extra in ({}, {"suffix": 256}, {"suffix": 256, "text_valid": [200]}):
            bm = gnaflex.block_mask((16, 32, 32), (9, 13, 13), q_tile=tile, device="cpu", **extra)
            q, k, v = tensors(bm.seq_lengths[0])
            calls = {
                name: functools.partial(gnaflex.flex_attention, q, k, v, block_mask=mask, backend="flex")
                for name, mask in (("masked", bm), ("floor", all_full(bm)))
            }
            name = ", ".join(extra) or "no text"
            times = interleaved(calls, rounds)
            yield row(
                f"16x32x32 window 9x13x13 fp32, {order}, {name}: over the same lists all full",
                ratios(times, "masked", "floor"), "x", 1.25, 1.1,
            )  # fmt: skip


def graphs() -> Row:
    """Compiled graphs over ten windows, strides, causal flags, prompts and biases of one grid."""
    from gnaflex.compiled import _graphs

    q, k, v = tensors(512 + 64, heads=2, dim=16)
    generator = torch.Generator().manual_seed(1)
    before = len(_graphs), counters["stats"]["unique_graphs"]
    for n in range(10):
        bm = gnaflex.block_mask(
            (8, 8, 8), (3 + n % 5, 8 - n % 4, 5), (1 + n % 3, 1, 1), is_causal=(n % 2 == 1, False, False),
            prefix=64, text_valid=torch.tensor([64 - 5 * n], dtype=torch.int32), device="cpu",
        )  # fmt: skip
        bias = gnaflex.relative_bias(bm, torch.randn(2, 15, 15, 15, generator=generator))
        gnaflex.flex_attention(q, k, v, score_mod=bias, block_mask=bm, backend="flex")
    made = max(len(_graphs) - before[0], counters["stats"]["unique_graphs"] - before[1])
    return row("graphs over ten windows, prompts and biases of one grid", [made], "graphs", 1, 1)
