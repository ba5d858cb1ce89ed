"""CUTLASS kernels for perfectly block-sparse problems; the place they will be dispatched from.

No kernel is in this release, which :func:`unsupported_reasons` says of every call. cutlass is imported
nowhere yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def unsupported_reasons(query: Tensor) -> Iterator[str]:
    """Every reason why no CUTLASS kernel runs this call; none would mean that one does."""
    yield "this release of gnaflex has no CUTLASS kernel yet"
    if query.device.type != "cuda":
        yield f"it needs an NVIDIA GPU of the Hopper or Blackwell family, the query is on {query.device}"
