"""How long the planner takes: plans of about 1.2 million tokens, a whole search, the nearest problems."""

from __future__ import annotations

from collections.abc import Iterator

from .measure import Row, fresh_process, row

MUST, AIM = 10, 5  # milliseconds of a plan in 3-D
CASES = {  # what, arguments of GNA: 128 * 96 * 96 = 1,179,648 tokens
    "stride 1": "(128, 96, 96), (16, 24, 24)",
    "stride 16x8x8": "(128, 96, 96), (16, 24, 24), (16, 8, 8)",
    "window 17x25x31 stride 3x5x7": "(128, 96, 96), (17, 25, 31), (3, 5, 7)",
    "dilation 2x3x1": "(128, 96, 96), (16, 24, 24), (4, 6, 6), (2, 3, 1)",
}
PLAN = """
import time, sympy, gnaflex
gnaflex.plan(gnaflex.GNA((8, 8, 8), 3))  # what every process pays once: sympy's own first use
start = time.perf_counter()
plan = gnaflex.plan(gnaflex.GNA({spec}), {tiles}kv_tiling="{tiling}")
plan.is_block_sparse, plan.sparsity, plan.work_speedup, plan.tile_speedup_worst
print(1e3 * (time.perf_counter() - start))
"""
RANDOM = """
import gc, random, time, sympy, gnaflex
gnaflex.plan(gnaflex.GNA((8, 8, 8), 3))
random.seed({seed})
for _ in range({count}):
    a, b = random.randint(60, 180), random.randint(60, 180)
    shape = (a, b, 1_200_000 // (a * b))
    dilation = [random.choice((1, 1, 2, 3)) for _ in shape]
    window = [random.randint(2, n // d) for n, d in zip(shape, dilation)]
    spec = gnaflex.GNA(shape, window, [random.randint(1, w) for w in window], dilation)
    gc.collect()
    start = time.perf_counter()
    gnaflex.plan(spec, kv_tiling=random.choice(("static", "dynamic"))).work_speedup
    print(1e3 * (time.perf_counter() - start))
"""
SECONDS = """
import time, gnaflex
start = time.perf_counter()
{code}
print(time.perf_counter() - start)
"""
SEARCH = "gnaflex.search((30, 48, 80), windows=range(2, 81, 2), kv_tiling='{}')"
NEAREST = "gnaflex.nearest(gnaflex.GNA({}, (18, 24, 24), (5, 6, 7)))"


def measure(quick: bool) -> Iterator[Row]:
    """Rows in order; every figure is a first call in a fresh process."""
    runs = 3 if quick else 7
    for what, spec in CASES.items():
        for name, tiles in (("tiles given", "(4, 8, 8), (2, 8, 8), "), ("best tiles", "")):
            for tiling in ("static", "dynamic"):
                code = PLAN.format(spec=spec, tiles=tiles, tiling=tiling)
                times = [fresh_process(code)[0] for _ in range(runs)]
                yield row(f"plan 128x96x96 {what}, {name}, {tiling}", times, "ms", MUST, AIM)
    many = [fresh_process(RANDOM.format(seed=seed, count=40)) for seed in range(1 if quick else 5)]
    each = [took for times in many for took in times]
    yield row("plan random 3-D problems of 1.2 M tokens, best tiles", each, "ms", MUST, AIM)
    for tiling in ("static", "dynamic"):
        times = [
            fresh_process(SECONDS.format(code=SEARCH.format(tiling)))[0] for _ in range(1 if quick else 5)
        ]
        yield row(f"search 30x48x80, even windows, all strides, all tiles, {tiling}", times, "s", 10, 5)
    for shape in ((33, 45, 80), (21, 45, 80)):
        times = [
            fresh_process(SECONDS.format(code=NEAREST.format(shape)))[0] for _ in range(1 if quick else 5)
        ]
        yield row(f"nearest {'x'.join(map(str, shape))}, any tiles", times, "s")
