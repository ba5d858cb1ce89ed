"""Row-major tokens as TMA sees them: tensors of axes, channels, and one mode of all else."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync


@cute.jit
def _gcd(a: Int64, b: Int64) -> Int64:
    while b != 0:
        a, b = b, a % b
    return a


def _apart(number: Any, stride: Any) -> Int64:
    """A stride, or 0 where there is just one to stride over (which may carry any number)."""
    return Int64(cutlass.select_(number == 1, Int64(0), Int64(stride)))


class Grid:
    """The tokens of the dilation groups of a launch, per axis with the last axis fastest: tokens of a group,
    rows of the sequence from one to the next, and from one group to the next, the number of groups."""

    def __init__(self, lengths: Any, steps: Any, group_steps: Any, groups: Any, start: Any) -> None:
        self.lengths, self.steps, self.group_steps, self.groups = lengths, steps, group_steps, groups
        self.start = start  # the row of the first token of the first group


def view(x: cute.Tensor, grid: Grid, head_dim: int) -> tuple[cute.Tensor, tuple[Int32, ...]]:
    """[batch, heads, rows, head_dim] as (axes, head_dim, L), and what head, batch and group each count in L.

    CuTe folds modes by the first stride instead of their gcd (4.8.1), so L is folded here: one mode whose
    stride is the gcd of those of heads, batch and dilation groups.
    """
    shape, stride = x.shape, x.stride
    token = Int64(stride[2])
    apart = [_apart(shape[1], stride[1]), _apart(shape[0], stride[0])]
    apart += [_apart(n, step * token) for n, step in zip(grid.groups, grid.group_steps, strict=True)]
    unit = apart[0]
    for one in apart[1:]:
        unit = _gcd(unit, one)
    unit = cutlass.select_(unit == 0, Int64(head_dim), unit)
    factors = tuple(Int32(one // unit) for one in apart)
    counts = (shape[1], shape[0], *grid.groups)
    extent = Int32(1)
    for count, factor in zip(counts, factors, strict=True):
        extent += (count - 1) * factor
    axes = tuple(reversed(grid.lengths))
    strides = tuple(cute.assume(Int64(step) * token, divby=8) for step in reversed(grid.steps))
    start = cute.assume(Int64(grid.start) * token, divby=8)
    layout = cute.make_layout((axes, head_dim, extent), stride=(strides, 1, cute.assume(unit, divby=8)))
    return cute.make_tensor(x.iterator + start, layout), factors


def transposed(x: cute.Tensor) -> cute.Tensor:
    """Channels first."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, 2]))


def box_copy(
    atom: Any, tensor: Any, origin: Any, slot: Any, smem: Any, box: Any, head_dim: int, rows_first: bool
) -> Any:
    """Destination and source of the copy of a box; ``origin`` and ``box`` with the first axis fastest."""
    at: Any = (origin, 0)
    tile: Any = (box, head_dim)
    zero: Any = ((0,) * len(box), 0)
    if not rows_first:
        at, tile, zero = at[::-1], tile[::-1], zero[::-1]
    source = cute.local_tile(cute.domain_offset(at, tensor[None, None, slot]), tile, zero)
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), cute.group_modes(source, 0, 2)
    )
