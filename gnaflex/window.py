"""The symbolic room: the half-open window ``[lo(i), hi(i))`` of a query, in sympy, and its printers.

Everything gnaflex compiles is a view of these two expressions per axis. They are built from the definition
(arXiv 2504.16922, section 3; border and leader rules of NATTEN 0.21.7), simplified with the integer facts
of the problem, and printed to plain integer code, numpy code, torch code and readable text. ``i`` counts
the queries inside one dilation group of ``n`` tokens, as do ``lo`` and ``hi``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gnaflex.spec import GNA, Axis

if TYPE_CHECKING:
    import sympy

IntArray = npt.NDArray[np.int64]


class Window(NamedTuple):
    """The simplified expressions of one axis and group length, and the simplifications that applied."""

    lo: sympy.Expr
    hi: sympy.Expr
    facts: tuple[str, ...]


class _Ranged(NamedTuple):
    """An expression and the least and greatest value it takes over the queries."""

    expr: sympy.Expr
    low: int
    high: int


@lru_cache(maxsize=4096)
def window(n: int, w: int, s: int, is_causal: bool) -> Window:
    """The window of query ``i`` in a group of ``n`` tokens: ``lo(i)`` and ``hi(i)``, simplified."""
    lo, hi = definition(n, w, s, is_causal)
    simplify = _Simplifier(n)
    if n == w and not is_causal:
        simplify.facts.append("window == length: every query sees the whole axis")
    elif s == w and n % s == 0 and not is_causal:
        simplify.facts.append("stride == window divides the length: blocked attention")
    if s == 1:
        simplify.facts.append("stride 1: every query leads its own stride group, no floor")
    return Window(simplify(lo).expr, simplify(hi).expr, tuple(dict.fromkeys(simplify.facts)))


def definition(n: int, w: int, s: int, is_causal: bool) -> tuple[sympy.Expr, sympy.Expr]:
    """``lo(i)`` and ``hi(i)`` word for word as GNA defines them, nothing simplified."""
    from sympy import Add, Integer, Max, Min, Mul, Rational, floor

    i = _query()
    base = Mul(s, floor(Mul(Rational(1, s), i, evaluate=False), evaluate=False), evaluate=False)
    to_leader = s - 1 if is_causal else s // 2
    leader = Min(Add(base, to_leader, evaluate=False), Integer(n - 1), evaluate=False)
    if is_causal:
        lo = Max(Add(leader, 1 - w, evaluate=False), Integer(0), evaluate=False)
        return lo, Add(i, 1, evaluate=False)
    start = Add(leader, -(w // 2), evaluate=False)
    lo = Max(Min(start, Integer(n - w), evaluate=False), Integer(0), evaluate=False)
    return lo, Add(lo, w, evaluate=False)


@lru_cache(maxsize=1)
def _query() -> sympy.Symbol:
    import sympy

    return sympy.Symbol("i", integer=True, nonnegative=True)


class _Simplifier:
    """One pass over an expression that drops whatever the range of the queries decides.

    Sums are pushed into clamps, nested clamps merge, a clamp that never binds goes, and a part that takes
    one value only becomes that value. ``sympy.simplify`` finds none of this, and takes 400 ms.
    """

    def __init__(self, n: int) -> None:
        import sympy

        self.sympy = sympy
        self.n = n
        self.facts: list[str] = []
        self.done: dict[sympy.Expr, _Ranged] = {}  # hi is lo and a step: no need to go through lo twice
        self.rules: dict[type, Callable[[Any], _Ranged]] = {
            sympy.Symbol: lambda node: _Ranged(node, 0, n - 1),
            sympy.Add: self._add,
            sympy.Mul: self._mul,
            sympy.floor: self._floor,
            sympy.Min: self._clamp,
            sympy.Max: self._clamp,
        }

    def __call__(self, node: sympy.Expr) -> _Ranged:
        if node.is_Integer:
            return _Ranged(node, int(node), int(node))
        if node not in self.done:
            out = self.rules[type(node)](node)
            self.done[node] = self._constant(out.low) if out.low == out.high else out
        return self.done[node]

    def _constant(self, value: int) -> _Ranged:
        return _Ranged(self.sympy.Integer(value), value, value)

    def _leaf(self, node: sympy.Expr) -> _Ranged:
        return self._constant(int(node)) if node.is_Integer else _Ranged(node, 0, 0)

    def _add(self, node: sympy.Expr) -> _Ranged:
        parts = [self(part) for part in node.args]
        shift = sum(part.low for part in parts if part.expr.is_Integer)
        (rest,) = [part for part in parts if not part.expr.is_Integer] or [self._constant(0)]
        return self._shift(rest, shift)

    def _shift(self, part: _Ranged, by: int) -> _Ranged:
        low, high = part.low + by, part.high + by
        if by == 0:
            return part
        if part.expr.is_Integer:
            return self._constant(low)
        if isinstance(part.expr, (self.sympy.Min, self.sympy.Max)):
            args = [self._shift(self._leaf(arg), by).expr for arg in part.expr.args]
            return _Ranged(type(part.expr)(*args, evaluate=False), low, high)
        if part.expr.is_Add:
            total = sum(int(arg) for arg in part.expr.args if arg.is_Integer) + by
            (core,) = [arg for arg in part.expr.args if not arg.is_Integer]
            return _Ranged(self.sympy.Add(core, total, evaluate=False) if total else core, low, high)
        return _Ranged(self.sympy.Add(part.expr, by, evaluate=False), low, high)

    def _mul(self, node: sympy.Expr) -> _Ranged:
        factor = int(node.args[0])
        part = self(node.args[1])
        if factor == 1:
            return part
        return _Ranged(
            self.sympy.Mul(factor, part.expr, evaluate=False), factor * part.low, factor * part.high
        )

    def _floor(self, node: sympy.Expr) -> _Ranged:
        divisor, part = _quotient(node)
        part = self(part)
        if divisor == 1:
            return part
        return _Ranged(node, part.low // divisor, part.high // divisor)

    def _clamp(self, node: sympy.Expr) -> _Ranged:
        is_min = isinstance(node, self.sympy.Min)
        parts = [self(part) for part in node.args]
        bounds = [part.low for part in parts if part.expr.is_Integer]
        moving = [part for part in parts if not part.expr.is_Integer]
        if not moving:
            return self._constant(min(bounds) if is_min else max(bounds))
        (part,) = moving
        if isinstance(part.expr, type(node)):
            bounds += [int(arg) for arg in part.expr.args if arg.is_Integer]
            (inner,) = [arg for arg in part.expr.args if not arg.is_Integer]
            part = self(inner)
        bound = min(bounds) if is_min else max(bounds)
        if (part.high <= bound) if is_min else (part.low >= bound):
            self.facts.append(
                f"{'min' if is_min else 'max'}(., {bound}) never binds:"
                f" {'at most' if is_min else 'at least'} {part.high if is_min else part.low}"
            )
            return part
        low, high = (min(part.low, bound), bound) if is_min else (bound, max(part.high, bound))
        return _Ranged(type(node)(part.expr, self.sympy.Integer(bound), evaluate=False), low, high)


def _quotient(node: sympy.Expr) -> tuple[int, sympy.Expr]:
    """Divisor and dividend of ``floor(dividend / divisor)``."""
    (inside,) = node.args
    if not inside.is_Mul:
        return 1, inside
    factor, part = inside.args
    return int(factor.q), part


# ---- printers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """How a target language writes the few operations that windows are made of."""

    floor: str = "({part} // {divisor})"
    minimum: str = "min({part}, {bound})"
    maximum: str = "max({part}, {bound})"

    def print(self, node: sympy.Expr, query: str = "i") -> str:
        """``node`` in this language, with the query variable called ``query``."""
        kind = type(node).__name__
        if kind == "floor":
            divisor, part = _quotient(node)
            return self.floor.format(part=self.print(part, query), divisor=divisor)
        if kind in ("Min", "Max"):
            (bound,) = [arg for arg in node.args if arg.is_Integer]
            (part,) = [arg for arg in node.args if not arg.is_Integer]
            template = self.minimum if kind == "Min" else self.maximum
            return template.format(part=self.print(part, query), bound=bound)
        if kind == "Mul":
            return f"{node.args[0]}*{self.print(node.args[1], query)}"
        if kind == "Add":
            (part,) = [arg for arg in node.args if not arg.is_Integer]
            by = sum(int(arg) for arg in node.args if arg.is_Integer)
            return f"{self.print(part, query)} {'-' if by < 0 else '+'} {abs(by)}"
        return query if kind == "Symbol" else str(node)


INTEGER = Dialect()
NUMPY = Dialect(minimum="np.minimum({part}, {bound})", maximum="np.maximum({part}, {bound})")
TORCH = Dialect(minimum="torch.clamp({part}, max={bound})", maximum="torch.clamp({part}, min={bound})")
TEXT = Dialect(floor="⌊{part}/{divisor}⌋")


@lru_cache(maxsize=1024)
def tables(n: int, w: int, s: int, is_causal: bool) -> tuple[IntArray, IntArray]:
    """``lo`` and ``hi`` of every query of a group of ``n`` tokens, int64 [n], read-only."""
    both = window(n, w, s, is_causal)
    i = np.arange(n)
    out = []
    for expr in (both.lo, both.hi):
        values = eval(NUMPY.print(expr), {"np": np, "i": i})
        out.append(np.broadcast_to(np.asarray(values, dtype=np.int64), (n,)).copy())
        out[-1].flags.writeable = False
    return out[0], out[1]


# ---- whole problems ----------------------------------------------------------------------------------


def axis_source(axis: Axis, number: int) -> list[str]:
    """The lines that test axis ``number`` in torch code; none when the axis is dense."""
    a, d = number, axis.dilation
    windows = [
        window(n, axis.window, axis.stride, axis.is_causal) for n in sorted({*axis.group_lengths})[::-1]
    ]
    lines, tests = [], []
    q, k = f"q{a}", f"k{a}"
    if d > 1:
        lines.append(f"g{a}, q{a}, j{a}, k{a} = q{a} % {d}, q{a} // {d}, k{a} % {d}, k{a} // {d}")
        tests.append(f"(j{a} == g{a})")
    bounds = []
    for end in ("lo", "hi"):
        printed = [TORCH.print(getattr(one, end), q) for one in windows]
        if len(set(printed)) == 1:
            bounds.append(printed[0])
        else:
            bounds.append(f"torch.where(g{a} < {axis.length % d}, {printed[0]}, {printed[1]})")
    lo, hi = bounds
    if lo != "0":
        tests.append(f"({k} >= {lo})")
    if hi != str(axis.group_length(0)):
        tests.append(f"({k} < {hi})")
    return [*lines, "ok = ok & " + " & ".join(tests)] if tests else []


def torch_source(spec: GNA) -> str:
    """The complete mask of a problem over row-major tokens as the source of a torch ``mask_mod``."""
    lines = ["def mask_mod(b, h, q, k):", "    ok = (q >= 0) & (k >= 0)"]
    for number, axis in enumerate(spec.axes):
        test = axis_source(axis, number)
        if not test:
            continue
        pitch = reduce(operator.mul, spec.shape[number + 1 :], 1)
        for name in "qk":
            quotient = name if pitch == 1 else f"{name} // {pitch}"
            digit = quotient if number == 0 else f"{quotient} % {axis.length}"
            lines.append(f"    {name}{number} = {digit}")
        lines += [f"    {line}" for line in test]
    return "\n".join([*lines, "    return ok", ""])


def source(spec: GNA) -> str:
    """What was compiled: per axis the window as text and integer code, and the mask as torch code.

    Returns:
        Text with one section per axis (and per dilation-group length where there are two), the
        simplifications that applied, and the ``"arith"`` mask_mod.

    Example:
        >>> import gnaflex
        >>> print(gnaflex.source(gnaflex.GNA(8, window=4, stride=4)))
        GNA(shape=(8,), window=(4,), stride=(4,))
        axis 0, n = 8
          lo(i) = 4*⌊i/4⌋
          hi(i) = 4*⌊i/4⌋ + 4
          def window0(i): return 4*(i // 4), 4*(i // 4) + 4
          - stride == window divides the length: blocked attention
          - min(., 7) never binds: at most 6
          - min(., 4) never binds: at most 4
          - max(., 0) never binds: at least 0
        <BLANKLINE>
        def mask_mod(b, h, q, k):
            ok = (q >= 0) & (k >= 0)
            q0 = q
            k0 = k
            ok = ok & (k0 >= 4*(q0 // 4)) & (k0 < 4*(q0 // 4) + 4)
            return ok
        <BLANKLINE>
    """
    lines = [repr(spec)]
    for number, axis in enumerate(spec.axes):
        for n in sorted({*axis.group_lengths})[::-1]:
            one = window(n, axis.window, axis.stride, axis.is_causal)
            of = f" of dilation groups g = x mod {axis.dilation}, i = x div {axis.dilation}" * (
                axis.dilation > 1
            )
            lo, hi = INTEGER.print(one.lo), INTEGER.print(one.hi)
            lines += [
                f"axis {number}, n = {n}{of}",
                f"  lo(i) = {TEXT.print(one.lo)}",
                f"  hi(i) = {TEXT.print(one.hi)}",
                f"  def window{number}(i): return {lo}, {hi}",
                *(f"  - {fact}" for fact in one.facts),
            ]
    return "\n".join([*lines, "", torch_source(spec)])
