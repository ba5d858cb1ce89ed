"""CUTLASS kernels for perfectly block-sparse problems; the place they will be dispatched from.

The Hopper kernel compiles and is checked statically; it has not run on a GPU, so no call is dispatched to
it, which :func:`unsupported_reasons` says. cutlass is imported where a kernel is compiled, and only there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def unsupported_reasons(query: Tensor) -> Iterator[str]:
    """Every reason why no CUTLASS kernel runs this call; none would mean that one does."""
    yield "the CUTLASS kernel has been compiled, not run: no call is dispatched to it yet"
    if query.device.type != "cuda":
        yield f"it needs an NVIDIA GPU of the Hopper or Blackwell family, the query is on {query.device}"
