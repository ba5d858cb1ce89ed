"""CUTLASS kernels for perfectly block-sparse problems, and what calls need before one runs them.

cutlass is imported where a kernel is compiled or loaded, and only there.
"""

from gnaflex.cuda_backend.detection import (
    known_reasons,
    lane,
    nearest,
    not_ready,
    problem_of,
    unsupported_reasons,
)

__all__ = ["known_reasons", "lane", "nearest", "not_ready", "problem_of", "unsupported_reasons"]
