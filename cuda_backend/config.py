"""What a kernel is compiled for: one frozen record, and which records are legal; no torch, no cutlass."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gnaflex.cuda_backend.tile_walk import KV_ROWS, KV_STEP, Q_ROWS, Q_STEP

from gnaflex.tiles import Tile

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
# By architecture: boxes of queries that a block takes at once, each with as many rows of its own
BOXES_AT_ONCE = {"sm_90a": 1, "sm_100a": 2, "sm_103a": 2}
ARCHITECTURES = tuple(BOXES_AT_ONCE)
# By architecture: the largest weight of a row may be 2 to this instead of 1, as its reference follows the
# maximum only when that grew by more
GROWTH = {"sm_90a": 0.0, "sm_100a": 8.0, "sm_103a": 8.0}
RUN_ON: dict[str, str] = {}  # by architecture, the device and date of a committed results file: none yet
SHARED_MEMORY = 232_448  # bytes of a block, 227 KiB: CUDA C++ Programming Guide, compute capability 9.0
MOST_STAGES = 4
BARRIER_BYTES = 1024
NOTE_BYTES = 2048  # Blackwell: what softmax tells the correction, two numbers per row of two halves
MOST_EXTENT = 256  # of a TMA box, per axis
MOST_AXES = 3  # a tensor map has five modes; channels and heads take two


def tried(arch: str) -> str:
    """What is known of an architecture's kernels."""
    on = RUN_ON.get(arch)
    not_run = "compiled and checked statically, not run on a GPU by its authors"
    return f"kernels for {arch}: {f'run by their authors on {on}' if on else not_run}"


@dataclass(frozen=True)
class KernelConfig:
    """A variant: what is fixed when it is compiled.

    Extents per axis, the last axis fastest. ``text``: there are extra tokens beside the grid. ``loads_only``:
    all but the loads is left out, for benchmarks.
    """

    arch: str
    dtype: str
    head_dim: int
    q_box: Tile
    kv_box: Tile
    text: bool = False
    loads_only: bool = False

    @property
    def name(self) -> str:
        """As a file may be called."""
        boxes = ("x".join(map(str, box)) for box in (self.q_box, self.kv_box))
        return "-".join(
            (
                self.arch,
                self.dtype,
                str(self.head_dim),
                *boxes,
                *["text"] * self.text,
                *["loads"] * self.loads_only,
            )
        )

    @property
    def rank(self) -> int:
        """Axes of the grid."""
        return len(self.q_box)

    @property
    def kv_rows(self) -> int:
        """Keys of a tile: columns of the scores."""
        return math.prod(self.kv_box)

    @property
    def stages(self) -> int:
        """How much is in flight, as much as fits beside the queries and the output: key tiles and as many
        value tiles (Hopper), or tiles of either (Blackwell)."""
        row, tile = 2 * self.head_dim, 2 * self.head_dim * self.kv_rows
        room = SHARED_MEMORY - BARRIER_BYTES
        if self.arch == "sm_90a":
            return int(min((room - 2 * Q_ROWS * row) // (2 * tile), MOST_STAGES))
        return int(min((room - NOTE_BYTES - 3 * Q_ROWS * row) // tile, 2 * MOST_STAGES))


def obstacles(config: KernelConfig) -> list[str]:
    """Every reason why a variant cannot be compiled; none for a legal one."""
    why = []
    for name, value, known in (
        ("architecture", config.arch, ARCHITECTURES),
        ("dtype", config.dtype, DTYPES),
        ("head_dim", config.head_dim, HEAD_DIMS),
    ):
        if value not in known:
            why.append(f"{name} must be {' or '.join(map(str, known))}: got {value}")
    if not 1 <= config.rank == len(config.kv_box) <= MOST_AXES:
        why.append(f"boxes need 1 to {MOST_AXES} axes, as many for queries as for keys")
    for name, box, rows, step in (
        ("query", config.q_box, Q_ROWS, Q_STEP),
        ("key", config.kv_box, KV_ROWS, KV_STEP),
    ):
        tokens = math.prod(box)
        if min(box) < 1 or max(box) > MOST_EXTENT or tokens > rows or tokens % step:
            why.append(f"a {name} box must hold a multiple of {step} tokens, at most {rows}: got {box}")
    return why
