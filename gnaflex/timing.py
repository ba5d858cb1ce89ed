"""How long an attention call takes, predicted from a plan and a few published numbers; no torch.

The model: visited tiles times what a tile costs at the rate a dense kernel reaches, spread over the
multiprocessors; masked tiles cost a factor more; a pass that permutes tokens moves q, k, v and o once in and
out. Four constants are fitted, to 20 times that NATTEN published: two rates, the factor and the permutation's
rate; ``python tests/test_timing.py`` prints every published figure beside its prediction. PEERS.md, GNA.md
and KERNELS.md, cited below, are this project's notes; PEERS.md copies NATTEN's tables. No kernel of gnaflex
itself is calibrated yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from gnaflex import roofline
from gnaflex.planner import Plan, check_choice
from gnaflex.spec import GNAError, whole

Backend = Literal["cuda", "flex", "natten"]


@dataclass(frozen=True)
class Device:
    """A GPU, as the model sees it. ``dataclasses.replace`` makes one with rates of your own.

    Fields: ``peak_tflops`` dense bf16/fp16 and ``attention_tflops`` what an attention kernel reaches forward
    at head_dim 128, both in 1e12 FLOP/s; ``multiprocessors``; ``exp_rate`` in 1e12 exponentials/s (a kernel
    needs one per score, or 4 * head_dim FLOPs); ``memory_rate`` in 1e12 bytes/s; ``source`` of each;
    ``by_roofline``, whether "cuda" kernels reach ``attention_tflops`` with their best tiles, and with others
    and other head_dims the share of it that gnaflex/roofline.py says.

    Example:
        >>> import dataclasses
        >>> dataclasses.replace(DEVICES["H100"], attention_tflops=740.0).name  # FlashAttention-3's best
        'H100'
    """

    name: str
    aliases: tuple[str, ...]
    peak_tflops: float
    attention_tflops: float
    multiprocessors: int
    exp_rate: float
    memory_rate: float
    source: str
    by_roofline: bool = False


_HOPPER = (
    "peak: PEERS.md. attention: geometric mean of NATTEN's fp16 kernels on H100 (PEERS.md), TFLOP over "
    "seconds: cuDNN dense 163.1/0.2833 and 52.8/0.0974, block-sparse 14.7/0.0234 and 5.15/0.0079; "
    "FlashAttention-3's 740 is a best case. multiprocessors: datasheet, SXM5. exp: FlashAttention-3 "
    "(arXiv 2407.08608), on ping-pong scheduling; also 16 a clock and multiprocessor at 1.83 GHz."
)
DEVICES = {
    "H100": Device(
        "H100", ("h100 sxm", "h100 80gb hbm3"), 989, 598, 132, 3.9, 3.35, f"{_HOPPER} memory: datasheet."
    ),
    "H200": Device(
        "H200", (), 989, 598, 132, 3.9, 4.8, f"{_HOPPER} memory: datasheet. H200 is H100 with other memory."
    ),
    "B200": Device(
        *("B200", (), 2250, 1212, 148, 4.4, 8.0),
        "peak: PEERS.md. attention: mean of NATTEN's cuDNN dense (PEERS.md), TFLOP over seconds: "
        "163.1/0.1353 and 52.8/0.0433; FlashAttention-4's 1600 is a best case. multiprocessors, memory: "
        "datasheet. exp: H100's rate per multiprocessor, 3.9 * 148 / 132.",
        by_roofline=True,
    ),
}

# Fitted: geometric mean of 1.53, 1.46 (B200), 1.65 and 1.51 (H100), each NATTEN's kernel time at stride 1
# over its block-sparse time, over the ratio of visited tiles (PEERS.md). NATTEN masks all tiles or none.
MASK_FACTOR = 1.54
# Fitted: 1e12 bytes/s. The permutations in PEERS.md's table moved 0.98 to 1.46, the same on both devices, so
# the rate is no share of the memory's (3.35 and 8.0). Geometric middle; 2-D grids ran faster than 3-D ones.
PERMUTE_RATE = 1.2
# Assumed, seconds: a usual launch and drain of one CUDA kernel. All published times are too long to show it.
LAUNCH_SECONDS = 5e-6
# The matrix units take queries in 64 rows (wgmma's M: PTX ISA), keys in 16 (the second product: KERNELS.md).
_Q_STEP, _KV_STEP = 64, 16
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2}
_DENSE_ROWS = 128


@dataclass(frozen=True)
class Estimate:
    """A prediction for one forward attention call. All times are in seconds.

    ``kernel_seconds`` is what the visited tiles would take unmasked, ``mask_seconds`` what masking adds,
    ``permute_seconds`` and ``launch_seconds`` the rest. ``dense_seconds`` is the whole of a dense call.
    ``waves`` is query tiles of all heads per multiprocessor, ``balance`` the share of the kernel's time that
    the mean multiprocessor works (1 is perfect), ``flops`` the FLOPs of the allowed pairs, 4 * head_dim each.
    """

    device: Device
    kernel_seconds: float
    mask_seconds: float
    permute_seconds: float
    launch_seconds: float
    dense_seconds: float
    waves: float
    balance: float
    flops: int

    @property
    def seconds(self) -> float:
        """The whole call: the sum of its parts."""
        return self.kernel_seconds + self.mask_seconds + self.permute_seconds + self.launch_seconds

    @property
    def speedup(self) -> float:
        """Dense time over this time."""
        return self.dense_seconds / self.seconds

    @property
    def tflops(self) -> float:
        """Useful FLOPs a second, in 1e12."""
        return 1e-12 * self.flops / self.seconds


def estimate(
    plan: Plan,
    heads: int,
    head_dim: int,
    dtype: Any = "bfloat16",
    device: str | Device = "H200",
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    backend: Backend = "cuda",
    permute: bool | None = None,
) -> Estimate:
    """The seconds that one forward attention call takes.

    Tiles cost what a dense kernel's do, clipped ones included; masked ones ``MASK_FACTOR`` as much. Query
    tiles go to the multiprocessors longest first, so the slowest is done after the mean work, the longest
    tile, or its number of shortest tiles, whichever is most; and never before memory has moved q, k, v and o.
    Rates were published for head_dim 128 and grids of 65,536 tokens and more: others are extrapolated.

    Args:
        plan: how the problem tiles.
        heads, kv_heads: heads of the queries, and of keys and values (as many unless given).
        head_dim: numbers per head.
        dtype: "bfloat16" or "float16", or torch's.
        device: a name ("H200", "NVIDIA H100 80GB HBM3") or a :class:`Device`.
        batch: problems in the call.
        backend: "cuda" (masks partial tiles, reads row-major tokens: KERNELS.md's design; on B200 other tiles
            and head_dims by the roofline of our kernel: gnaflex/roofline.py), "flex" (masks
            partial and clipped tiles, permutes; at the dense rate, which FlexAttention need not reach), or
            "natten" (masks every tile unless none needs it, permutes: PEERS.md).
        permute: whether the call permutes tokens; the backend's habit unless given. False for layers that
            stay in tile-major order.

    Raises:
        GNAError: a device, dtype or backend is unknown, or a count is no positive integer.

    Example:
        >>> import gnaflex
        >>> from gnaflex.planner import plan
        >>> video = gnaflex.GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
        >>> e = estimate(plan(video, (4, 8, 8), (2, 8, 8)), 24, 128, "float16", "B200")
        >>> f"{1e3 * e.seconds:.1f} ms, {e.speedup:.1f} times faster than dense"  # NATTEN's kernel: 13.0 ms
        '12.9 ms, 10.4 times faster than dense'
    """
    if not isinstance(plan, Plan):
        raise GNAError(
            f"a plan is needed: got {type(plan).__name__}. Write estimate(gnaflex.plan(spec), ...)."
        )
    check_choice("backend", backend, get_args(Backend))
    gpu, element = _device(device), _element_bytes(dtype)
    heads, head_dim, batch = whole("heads", heads), whole("head_dim", head_dim), whole("batch", batch)
    kv_heads = _kv_heads(heads, kv_heads)
    calls, tokens = heads * batch, plan.spec.num_tokens
    moved = 2 * tokens * head_dim * element * batch * (heads + kv_heads)  # bytes of q, k, v and o
    floor = moved / (1e12 * gpu.memory_rate)
    tile = _tile_seconds(gpu, head_dim, math.prod(plan.q_tile), math.prod(plan.kv_tile), backend)
    plain, _ = _longest_first(_tile_costs(plan, "none"), calls, gpu)
    masked, balance = _longest_first(_tile_costs(plan, _masks(plan, backend)), calls, gpu)
    kernel = max(plain * tile, floor)
    permutes = backend != "cuda" if permute is None else permute
    return Estimate(
        device=gpu,
        kernel_seconds=kernel,
        mask_seconds=max(masked * tile, floor) - kernel,
        permute_seconds=_permute_seconds(moved, gpu) if permutes else 0.0,
        launch_seconds=(1 + 2 * permutes) * LAUNCH_SECONDS,  # tokens in, attention, tokens out
        dense_seconds=max(_dense_seconds(tokens, calls, head_dim, gpu), floor) + LAUNCH_SECONDS,
        waves=plan.query_tiles * calls / gpu.multiprocessors,
        balance=balance,
        flops=4 * head_dim * plan.allowed_pairs * calls,
    )


def end_to_end(speedup: float, attention_share: float, sparse_share: float = 1.0) -> float:
    """How much faster a model gets when its attention does: ``1 / (1 - f*g + f*g/s)`` (Amdahl; GNA.md).

    Args:
        speedup: ``s``, of the attention call.
        attention_share: ``f``, the share of the dense model's time that attention takes, 0 to 1.
        sparse_share: ``g``, the share of the steps that use it; see :func:`sparse_share`.

    Raises:
        GNAError: a share lies outside 0 to 1, or the speed-up is not positive.

    Example:
        >>> round(end_to_end(11.11, 0.607, sparse_share(50, dense_steps=15)), 2)  # HunyuanVideo: 1.63 printed
        1.63
    """
    for name, share in (("attention_share", attention_share), ("sparse_share", sparse_share)):
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise GNAError(f"{name} must lie in 0 to 1: got {share!r}. Write {name}=0.5 for a half.")
    if not isinstance(speedup, Real) or not 0 < speedup < math.inf:
        raise GNAError(f"speedup must be positive and finite: got {speedup!r}. Write speedup=1.0 for none.")
    sparse = attention_share * sparse_share
    return 1 / (1 - sparse + sparse / speedup)


def sparse_share(steps: int, dense_steps: int) -> float:
    """The share of a sampler's steps that are sparse when the first ones stay dense (the paper's schedule).

    Raises:
        GNAError: there are no steps, or fewer than dense ones.

    Example:
        >>> sparse_share(50, dense_steps=15)
        0.7
    """
    steps = whole("steps", steps)
    dense_steps = whole("dense_steps", dense_steps, 0, steps)
    return 1 - dense_steps / steps


# ---- parts -------------------------------------------------------------------------------------------


class _Costs(NamedTuple):
    """Query tiles of one head, and what they cost in key tiles: all of them, the dearest, the cheapest."""

    tiles: int
    total: float
    longest: float
    shortest: float


def _tile_costs(plan: Plan, masks: str) -> _Costs:
    """A masked key tile counts ``MASK_FACTOR``, any other one. The masks: none, partial, partial and clipped,
    or all."""
    shown = {"partial": "unmasked", "partial and clipped": "whole"}.get(masks)  # what goes unmasked
    visited = np.ones(1)
    clear = np.ones(1) if shown else np.zeros(1)
    for axis in plan.axes:  # query tiles with equal counts on an axis are one
        counts = [(one.visited, getattr(one, shown or "visited")) for one in axis]
        pairs = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in counts]), axis=0)
        visited = np.multiply.outer(visited, pairs[:, 0]).ravel()
        clear = np.multiply.outer(clear, pairs[:, 1]).ravel()
    extra = 0.0 if masks == "none" else MASK_FACTOR - 1
    costs = visited + extra * (visited - clear)
    unmasked = {"partial": plan.full_tiles + plan.clipped_tiles, "partial and clipped": plan.full_tiles}
    total = plan.touched_tiles + extra * (plan.touched_tiles - unmasked.get(masks, 0))
    return _Costs(plan.query_tiles, total, float(costs.max()), float(costs.min()))


def _masks(plan: Plan, backend: Backend) -> str:
    """Which tiles a backend masks."""
    if backend == "natten":
        return "none" if plan.is_block_sparse else "all"
    return "partial" if backend == "cuda" else "partial and clipped"


def _longest_first(costs: _Costs, calls: int, gpu: Device) -> tuple[float, float]:
    """The time until the last multiprocessor is done, in key tiles, and how busy the mean one is."""
    mean = costs.total * calls / gpu.multiprocessors
    most = -(-costs.tiles * calls // gpu.multiprocessors)
    time = max(mean, costs.longest, most * costs.shortest)
    return time, mean / time


def _tile_seconds(gpu: Device, head_dim: int, q_rows: int, kv_rows: int, backend: str = "") -> float:
    """One multiprocessor's time for one pair of tiles, rows rounded up to what the matrix units take; those
    of our kernel on Blackwell by its roofline, two boxes of queries at once."""
    rate, q_step = min(gpu.attention_tflops, 4 * head_dim * gpu.exp_rate), _Q_STEP
    kv_rows = -(-kv_rows // _KV_STEP) * _KV_STEP
    if gpu.by_roofline and backend == "cuda":
        rate, q_step = gpu.attention_tflops * roofline.tile_rate(2, kv_rows, head_dim), roofline.ROWS
    scores = -(-q_rows // q_step) * q_step * kv_rows
    return 4e-12 * head_dim * scores * gpu.multiprocessors / rate


def _dense_seconds(tokens: int, calls: int, head_dim: int, gpu: Device) -> float:
    blocks = -(-tokens // _DENSE_ROWS)
    tiles, _ = _longest_first(_Costs(blocks, blocks**2, blocks, blocks), calls, gpu)
    return tiles * _tile_seconds(gpu, head_dim, _DENSE_ROWS, _DENSE_ROWS)


def _permute_seconds(moved: int, gpu: Device) -> float:
    """Every byte is read and written."""
    return 2e-12 * moved / min(PERMUTE_RATE, gpu.memory_rate)


def _device(device: str | Device) -> Device:
    if isinstance(device, Device):
        return device
    words = str(device).lower()
    for gpu in DEVICES.values():
        if words.removeprefix("nvidia ") in (gpu.name.lower(), *gpu.aliases):
            return gpu
    raise GNAError(
        f"device must be one whose rates are known, {', '.join(sorted(DEVICES))}: got {device!r}.\n"
        '  Write device="H200", or describe yours: dataclasses.replace(gnaflex.timing.DEVICES["H200"], '
        "name=..., attention_tflops=..., ...)."
    )


def _element_bytes(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name in _ELEMENT_BYTES:
        return _ELEMENT_BYTES[name]
    raise GNAError(
        f"dtype must be one whose rates were published, {' or '.join(_ELEMENT_BYTES)}: got {name}. "
        'Write dtype="bfloat16".'
    )


def _kv_heads(heads: int, given: int | None) -> int:
    kv_heads = heads if given is None else whole("kv_heads", given)
    if heads % kv_heads:
        raise GNAError(
            f"heads must be a multiple of kv_heads: got heads={heads}, kv_heads={kv_heads}. "
            f"Write kv_heads={math.gcd(heads, kv_heads)}."
        )
    return kv_heads
