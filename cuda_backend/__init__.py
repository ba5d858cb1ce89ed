"""CUTLASS kernels for perfectly block-sparse problems, and what calls need before one runs them.

cutlass is imported where a kernel is compiled or loaded, and only there.
"""

from gnaflex.cuda_backend.detection import nearest, problem_of, run, unsupported_reasons

__all__ = ["nearest", "problem_of", "run", "unsupported_reasons"]
