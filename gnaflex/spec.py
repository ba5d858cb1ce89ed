"""What is asked for: a Generalized Neighborhood Attention problem as a frozen, hashable value."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class GNAError(ValueError):
    """A problem, mask or call that gnaflex refuses; the message names the rule, the numbers and a remedy."""


class Axis(NamedTuple):
    """One axis of a problem: ``length`` tokens, and the window every token of it sees (lengths in tokens)."""

    length: int
    window: int
    stride: int
    dilation: int
    is_causal: bool

    def group_length(self, group: int) -> int:
        """Tokens in dilation group ``group`` (``x % dilation == group``); it depends on the group when
        the dilation does not divide the length."""
        return -((group - self.length) // self.dilation)

    @property
    def group_lengths(self) -> tuple[int, ...]:
        """The length of every dilation group, longest first; at most two different values."""
        return tuple(self.group_length(group) for group in range(self.dilation))


@dataclass(frozen=True, init=False)
class GNA:
    """A Generalized Neighborhood Attention problem (Hassani et al., arXiv 2504.16922).

    Args:
        shape: tokens per axis, row-major (the last axis varies fastest); any rank >= 1.
        window: keys that each query sees per axis (NATTEN: ``kernel_size``); ``-1`` is the whole axis.
        stride: queries per stride group, which share one window; 1 slides, ``stride == window`` blocks.
        dilation: distance between neighbouring keys of a window; ``"max"`` is ``length // window``.
        is_causal: per axis, whether a query sees no key behind it.

    Every argument but ``shape`` may be a scalar, which then holds on every axis. Integers may be Python,
    numpy or torch scalars. Rules, per axis: ``1 <= stride <= window``, ``dilation >= 1`` and
    ``window * dilation <= length``.

    Raises:
        GNAError: a rule is broken. The message names the rule, the axis, the numbers and a remedy.

    Example:
        >>> import gnaflex
        >>> gnaflex.GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
        GNA(shape=(30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
        >>> gnaflex.GNA((16, 44, 80), window=(-1, 4, 16), dilation=(1, "max", 5)).dilation
        (1, 11, 5)
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def __init__(
        self,
        shape: int | Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | str | Sequence[int | str] = 1,
        is_causal: bool | Sequence[bool] = False,
    ) -> None:
        raw = {
            "shape": shape,
            "window": window,
            "stride": stride,
            "dilation": dilation,
            "is_causal": is_causal,
        }
        for name, value in _resolve(raw).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return _call(self.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _FIELDS}

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @cached_property
    def num_tokens(self) -> int:
        """The number of tokens of the grid."""
        return math.prod(self.shape)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The problem axis by axis."""
        return tuple(map(Axis, self.shape, self.window, self.stride, self.dilation, self.is_causal))


_FIELDS = ("shape", "window", "stride", "dilation", "is_causal")
_DEFAULTS = {"stride": 1, "dilation": 1, "is_causal": False}


def _call(fields: dict[str, Any]) -> str:
    """The constructor call that makes these fields, defaults left out."""
    shown = [
        f"{name}={fields[name]!r}"
        for name in _FIELDS
        if name not in _DEFAULTS or any(entry != _DEFAULTS[name] for entry in fields[name])
    ]
    return f"GNA({', '.join(shown)})"


def _resolve(raw: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Broadcast, check every rule, and resolve ``-1`` and ``"max"``."""
    shape = _per_axis("shape", raw["shape"], None)
    if not shape:
        raise GNAError(
            "shape must name at least one axis: got shape=().\n"
            "  Give the length of every axis. Write GNA(shape=(30, 48, 80), window=(18, 24, 24))."
        )
    fields = {"shape": shape} | {name: _per_axis(name, raw[name], len(shape)) for name in _FIELDS[1:]}
    for name in ("shape", "window", "stride", "dilation"):
        fields[name] = tuple(_integer(name, axis, value) for axis, value in enumerate(fields[name]))
    fields["is_causal"] = tuple(_flag(axis, value) for axis, value in enumerate(fields["is_causal"]))
    columns = list(zip(*(fields[name] for name in _FIELDS), strict=True))
    nearest = dict(zip(_FIELDS, zip(*(_nearest(*column) for column in columns), strict=True), strict=True))
    for axis, column in enumerate(columns):
        if broken := _broken_rule(*column[:4]):
            rule, numbers, names = broken
            given = ", ".join(f"{name}={fields[name]}" for name in names)
            raise GNAError(f"{rule}: axis {axis} has {numbers}.\n  {given}. Write {_call(nearest)}.")
    return nearest


def _nearest(length: int, window: int, stride: int, dilation: int | str, is_causal: bool) -> Axis:
    """``-1`` and ``"max"`` resolved. A valid axis keeps its numbers; an invalid one gets valid numbers near
    its own, for the remedy of a message."""
    length = max(length, 1)
    if dilation == "max":
        dilation = 1 if window == -1 else length // max(window, 1)
    assert isinstance(dilation, int)
    dilation = min(max(dilation, 1), length)
    if not 1 <= window <= length:
        window = length // dilation
    return Axis(length, window, min(max(stride, 1), window), min(dilation, length // window), is_causal)


def _broken_rule(
    length: int, window: int, stride: int, dilation: int | str
) -> tuple[str, str, tuple[str, ...]] | None:
    """The first rule that one axis breaks, the numbers that break it, and the arguments they came from."""
    if length < 1:
        return "shape must be positive", f"length={length} < 1", ("shape",)
    if window == -1 and dilation == "max":
        rule = 'window=-1 and dilation="max" each need the other to be given'
        return rule, "both", ("shape", "window", "dilation")
    if dilation == "max":
        dilation = max(length // max(window, 1), 1)
    assert isinstance(dilation, int)
    if dilation < 1:
        return "dilation must be at least 1", f"dilation={dilation} < 1", ("dilation",)
    if window == -1 and dilation > length:
        return (
            "dilation must not exceed length",
            f"dilation={dilation} > length={length}",
            ("shape", "dilation"),
        )
    if window == -1:
        window = length // dilation
    if window < 1:
        return "window must be at least 1, or -1 for the whole axis", f"window={window} < 1", ("window",)
    if window * dilation > length:
        numbers = f"window*dilation={window}*{dilation}={window * dilation} > length={length}"
        return "window * dilation must not exceed length", numbers, ("shape", "window", "dilation")
    if stride < 1:
        return "stride must be at least 1", f"stride={stride} < 1", ("stride",)
    if stride > window:
        return "stride must not exceed window", f"stride={stride} > window={window}", ("window", "stride")
    return None


def _per_axis(name: str, value: Any, rank: int | None) -> tuple[Any, ...]:
    if isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        return (value,) * (rank or 1)
    entries = tuple(value)
    if rank is not None and len(entries) != rank:
        raise GNAError(
            f"{name} must have one entry per axis, or be a scalar: got {len(entries)} for rank {rank}.\n"
            f"  {name}={entries}. Give {rank} entries, or one scalar for every axis."
        )
    return entries


def _integer(name: str, axis: int, value: Any) -> Any:
    if name == "dilation" and isinstance(value, str) and value == "max":
        return value
    if getattr(value, "ndim", 0) == 0 and not _is_boolean(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    also = {"window": ", or -1 for the whole axis", "dilation": ', or "max"'}.get(name, "")
    raise GNAError(
        f"{name} must be an integer{also}: axis {axis} has {name}={value!r} ({type(value).__name__}).\n"
        "  Use a Python, numpy or torch integer; floats and bools are not rounded or counted."
    )


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An argument as an integer within bounds, refused otherwise."""
    number = None
    if getattr(value, "ndim", 0) == 0 and not _is_boolean(value):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        remedy = most if most is not None and number is not None and number > most else least
        raise GNAError(f"{name} must be an integer {bounds}: got {name}={value!r}. Write {name}={remedy}.")
    return number


def _flag(axis: int, value: Any) -> bool:
    if _is_boolean(value):
        return bool(value)
    raise GNAError(
        f"is_causal must be True or False: axis {axis} has is_causal={value!r} ({type(value).__name__}).\n"
        "  Periodic (circular) axes are not defined for GNA; pad the grid with wrapped tokens instead."
    )


def _is_boolean(value: Any) -> bool:
    scalar = getattr(value, "ndim", 0) == 0
    return isinstance(value, bool) or (scalar and "bool" in str(getattr(value, "dtype", "")))
