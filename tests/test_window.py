"""The symbolic room: golden text, value range and equality with the oracle; printers; what source() shows."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
from cases import NATTEN_CASES, all_1d, causal_variants

import gnaflex
from gnaflex import window
from gnaflex.reference import allowed_keys
from gnaflex.spec import GNA

# n, window, stride, causal -> lo, hi as text; least and greatest lo; least and greatest hi
TRIPLES = [
    ((8, 8, 1, False), "0", "8", (0, 0), (8, 8)),
    ((8, 8, 3, True), "0", "i + 1", (0, 0), (1, 8)),
    ((8, 4, 4, False), "4*⌊i/4⌋", "4*⌊i/4⌋ + 4", (0, 4), (4, 8)),
    ((8, 3, 1, False), "max(min(i - 1, 5), 0)", "max(min(i + 2, 8), 3)", (0, 5), (3, 8)),
    ((8, 4, 1, False), "max(min(i - 2, 4), 0)", "max(min(i + 2, 8), 4)", (0, 4), (4, 8)),
    ((8, 4, 2, False), "max(min(2*⌊i/2⌋ - 1, 4), 0)", "max(min(2*⌊i/2⌋ + 3, 8), 4)", (0, 4), (4, 8)),
    ((8, 3, 2, False), "min(2*⌊i/2⌋, 5)", "min(2*⌊i/2⌋ + 3, 8)", (0, 5), (3, 8)),
    ((9, 4, 4, False), "min(4*⌊i/4⌋, 5)", "min(4*⌊i/4⌋ + 4, 9)", (0, 5), (4, 9)),
    ((8, 3, 1, True), "max(i - 2, 0)", "i + 1", (0, 5), (1, 8)),
    ((8, 3, 3, True), "min(3*⌊i/3⌋, 5)", "i + 1", (0, 5), (1, 8)),
    ((7, 1, 1, False), "i", "i + 1", (0, 6), (1, 7)),
    ((1, 1, 1, True), "0", "1", (0, 0), (1, 1)),
]


@pytest.mark.parametrize("problem, lo, hi, lo_range, hi_range", TRIPLES)
def test_triple(problem, lo, hi, lo_range, hi_range):
    n, w, s, is_causal = problem
    both = window.window(*problem)
    assert (window.TEXT.print(both.lo), window.TEXT.print(both.hi)) == (lo, hi)
    starts, stops = window.tables(*problem)
    assert ((starts.min(), starts.max()), (stops.min(), stops.max())) == (lo_range, hi_range)
    spec = GNA(n, w, s, is_causal=is_causal)
    for i in range(n):
        assert set(range(starts[i], stops[i])) == allowed_keys(spec, i)


def test_tables_equal_the_oracle_on_every_1d_problem_up_to_14():
    seen = 0
    for spec in all_1d(14):
        if spec.dilation != (1,):
            continue
        (axis,) = spec.axes
        lo, hi = window.tables(axis.group_length(0), axis.window, axis.stride, axis.is_causal)
        for i in range(axis.length):
            assert set(range(lo[i], hi[i])) == allowed_keys(spec, i), spec
        seen += 1
    assert seen == 1120  # every (length, window, stride, causal)


def test_simplification_changes_nothing():
    """The definition evaluated by sympy itself, query by query, against the simplified expression."""
    for n, w, s, is_causal in [
        (9, 4, 3, False),
        (10, 6, 4, False),
        (8, 5, 5, True),
        (7, 7, 2, False),
        (11, 2, 2, True),
    ]:
        plain, simple = window.definition(n, w, s, is_causal), window.window(n, w, s, is_causal)
        (i,) = plain[1].free_symbols
        for query in range(n):
            want = [int(expr.subs(i, query)) for expr in plain]
            assert [int(expr.subs(i, query)) for expr in simple[:2]] == want


def test_every_printer_says_the_same():
    import torch

    for spec in causal_variants(GNA((12, 9), (5, 4), (3, 2))) + list(NATTEN_CASES[19:40]):
        for axis in spec.axes:
            n = axis.group_length(0)
            both = window.window(n, axis.window, axis.stride, axis.is_causal)
            want = np.stack(window.tables(axis.group_length(0), axis.window, axis.stride, axis.is_causal))
            i = torch.arange(n)
            for expr, values in zip(both[:2], want, strict=True):
                scalar = eval(f"lambda i: {window.INTEGER.print(expr)}")
                assert [scalar(x) for x in range(n)] == values.tolist()
                tensor = eval(window.TORCH.print(expr), {"torch": torch, "i": i})
                assert (torch.as_tensor(tensor) + 0 * i).tolist() == values.tolist()


def test_facts_name_what_was_used():
    assert "window == length: every query sees the whole axis" in window.window(8, 8, 1, False).facts
    assert "stride == window divides the length: blocked attention" in window.window(8, 4, 4, False).facts
    assert not any("blocked" in fact for fact in window.window(9, 4, 4, False).facts)
    assert any("stride 1" in fact for fact in window.window(9, 4, 1, False).facts)


def test_source_golden():
    want = """\
        GNA(shape=(6, 7), window=(6, 3), dilation=(1, 2), is_causal=(False, True))
        axis 0, n = 6
          lo(i) = 0
          hi(i) = 6
          def window0(i): return 0, 6
          - window == length: every query sees the whole axis
          - stride 1: every query leads its own stride group, no floor
          - min(., 5) never binds: at most 5
        axis 1, n = 4 of dilation groups g = x mod 2, i = x div 2
          lo(i) = max(i - 2, 0)
          hi(i) = i + 1
          def window1(i): return max(i - 2, 0), i + 1
          - stride 1: every query leads its own stride group, no floor
          - min(., 3) never binds: at most 3
        axis 1, n = 3 of dilation groups g = x mod 2, i = x div 2
          lo(i) = 0
          hi(i) = i + 1
          def window1(i): return 0, i + 1
          - stride 1: every query leads its own stride group, no floor
          - min(., 2) never binds: at most 2

        def mask_mod(b, h, q, k):
            ok = (q >= 0) & (k >= 0)
            q1 = q % 7
            k1 = k % 7
            g1, q1, j1, k1 = q1 % 2, q1 // 2, k1 % 2, k1 // 2
            ok = ok & (j1 == g1) & (k1 >= torch.where(g1 < 1, torch.clamp(q1 - 2, min=0), 0)) & (k1 < q1 + 1)
            return ok
        """
    spec = GNA((6, 7), (6, 3), dilation=(1, 2), is_causal=(False, True))
    assert gnaflex.source(spec) == textwrap.dedent(want)
