"""How long a mask takes to compile: fresh processes, cold caches, and torch's own create_block_mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.attention.flex_attention import create_block_mask

import gnaflex

from .measure import Row, fresh_process, interleaved, ratios, row

VIDEO = "(30, 48, 80), (18, 24, 24)"
LTX = "(69, 64, 96), 11"
MILLION = "(128, 96, 96), (16, 24, 24)"
CASES = [  # what, arguments of block_mask, must and aim in ms
    ("30x48x80 stride 16x8x8, tile-major", f"{VIDEO}, (16, 8, 8), q_tile=(2, 8, 8)", 6, 3),
    ("30x48x80 stride 1, tile-major", f"{VIDEO}, q_tile=(2, 8, 8)", 12, 6),
    ("30x48x80 stride 16x8x8, row-major", f"{VIDEO}, (16, 8, 8)", 15, 8),
    ("30x48x80 stride 1, row-major", VIDEO, 15, 8),
    ("69x64x96 window 11, compact, tile-major", f"{LTX}, q_tile=(2, 8, 8), full_width=False", 5, 2),
    ("69x64x96 window 11, compact, row-major", f"{LTX}, full_width=False", 25, 12),
    ("128x96x96, compact, tile-major", f"{MILLION}, q_tile=(2, 8, 8), full_width=False", 25, 12),
]
FIRST = """
import time, torch, sympy, gnaflex
def call(): return gnaflex.block_mask({arguments}, device="cpu")
times = []
for _ in range(6):
    start = time.perf_counter(); call(); times.append(1e3 * (time.perf_counter() - start))
print(times[0], sorted(times[1:])[2])
"""
IMPORT = """
import time, torch
a = time.perf_counter(); import gnaflex; b = time.perf_counter()
gnaflex.block_mask({video}, device="cpu"); c = time.perf_counter()
print(1e3 * (b - a), 1e3 * (c - b))
"""
MEMORY = """
import resource, gnaflex
gnaflex.block_mask((8, 8), 3, device="cpu")
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = used()
bm = gnaflex.block_mask({million}, q_tile=(2, 8, 8), full_width=False, device="cpu")
print((used() - before) / 1024, 4 * int((bm.kv_num_blocks + bm.full_kv_num_blocks).sum()) / 2**20)
"""


def measure(quick: bool) -> Iterator[Row]:
    """Rows in order; ``quick`` leaves out create_block_mask at full size."""
    runs = 3 if quick else 15
    imports = [fresh_process(IMPORT.format(video=VIDEO)) for _ in range(runs)]
    yield row("import gnaflex beyond torch", [one[0] for one in imports], "ms", 50, 20)
    yield row(
        "first block_mask beyond that, sympy's import included", [one[1] for one in imports], "ms", 400, 260
    )
    for what, arguments, must, aim in CASES:
        times = [fresh_process(FIRST.format(arguments=arguments)) for _ in range(runs)]
        yield row(
            f"{what}: first call in a process", [one[0] for one in times], "ms", must, aim, "sympy imported"
        )
        yield row(f"{what}: later calls", [one[1] for one in times], "ms")
    grown, lists = fresh_process(MEMORY.format(million=MILLION))
    yield row("128x96x96: memory grown while building", [grown], "MiB", note=f"forward lists {lists:.1f} MiB")
    yield from against_torch((16, 32, 32), (9, 13, 13), quick)
    if not quick:
        yield from against_torch((30, 48, 80), (18, 24, 24), quick)


def against_torch(shape: tuple[int, ...], window: tuple[int, ...], quick: bool) -> Iterator[Row]:
    """create_block_mask of the same mask, compiled before it is timed; equal block for block."""
    name = "x".join(map(str, shape))
    spec = gnaflex.GNA(shape, window)
    plain = gnaflex.mask_mod(spec, "arith")
    compiled = torch.compile(create_block_mask, dynamic=False)
    arguments = (plain, None, None, spec.num_tokens, spec.num_tokens, "cpu")
    theirs = compiled(*arguments)
    ours = gnaflex.block_mask(spec, device="cpu")
    equal = all(
        torch.equal(getattr(ours, f"{kind}_num_blocks"), getattr(theirs, f"{kind}_num_blocks"))
        and torch.equal(ours.to_dense(), theirs.to_dense())
        for kind in ("kv", "full_kv", "q", "full_q")
    )
    assert equal, "the masks differ"
    calls = {"theirs": lambda: compiled(*arguments), "ours": lambda: gnaflex.block_mask(spec, device="cpu")}
    times = interleaved(calls, 3)
    full = shape == (30, 48, 80)
    yield row(f"{name}: compiled create_block_mask", times["theirs"], "s")
    yield row(f"{name}: block_mask", [1e3 * took for took in times["ours"]], "ms")
    yield row(
        f"{name}: times faster than compiled create_block_mask",
        ratios(times, "theirs", "ours"),
        "x",
        1000 if full else None,
        3000 if full else None,
        "equal block for block",
    )
