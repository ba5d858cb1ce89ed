"""What a provider is held against: right results pass in every dtype, each kind of wrong one does not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.comparison import inputs
from benchmarks.problems import SMALL, Problem
from benchmarks.providers import PROVIDERS
from benchmarks.truth import CHECKED, Truth, rows_of, seen_by
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA

CPU = torch.device("cpu")
GRID = GNA((12, 16), (5, 4), (2, 4))
PROBLEMS = {
    "grid": Problem("", GRID, 2, 1, 32),
    "text": Problem("", GRID, 2, 1, 32, prefix=5, suffix=7),
    "dilated": Problem("", GNA((9, 16), (3, 4), (1, 2), (2, 3)), 2, 1, 32),
    "causal": Problem("", GNA((170,), 19, 3, 2, True), 2, 1, 32),
}
LONE = Problem("", GNA((60,), 1), 2, 1, 32)
DTYPES = torch.float32, torch.bfloat16, torch.float16
DIRECTIONS = pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
SOME = pytest.mark.parametrize("name", PROBLEMS)


def mask_of(problem):
    return dense_mask(problem.spec, prefix=problem.prefix, suffix=problem.suffix)


def attention(mask=None):
    """Plain attention under a mask."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def truth_of(name, gradients, dtype=torch.bfloat16):
    problem = PROBLEMS[name]
    return Truth(problem, inputs(problem, CPU, dtype), gradients), mask_of(problem)


# ---- which queries, and whom they see ----------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [*PROBLEMS.values(), Problem("", GNA(1, 1), 1, 1), *SMALL.values()],
    ids=lambda one: str(one.spec),
)
def test_the_ends_are_checked_and_others_between(problem):
    rows, n, first = rows_of(problem), problem.tokens, problem.prefix
    assert rows == sorted({*rows})
    assert {0, n - 1, first, first + problem.spec.num_tokens - 1} <= {*rows} <= {*range(n)}
    assert len(rows) <= CHECKED + 3
    if n > 1000:
        assert len(rows) >= CHECKED >= 48
        assert max(b - a for a, b in itertools.pairwise(rows)) < 2 * n / CHECKED


@SOME
def test_whom_queries_see(name):
    problem = PROBLEMS[name]
    rows = [*range(problem.tokens)]
    assert torch.equal(seen_by(problem, rows), mask_of(problem))
    few = rows_of(problem)
    assert torch.equal(seen_by(problem, few), mask_of(problem)[few])


# ---- right results -----------------------------------------------------------------------------------


@DIRECTIONS
@SOME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_results_pass(dtype, name, gradients):
    truth, mask = truth_of(name, gradients, dtype)
    ours = PROVIDERS['gnaflex, "sdpa"'](PROBLEMS[name], CPU).call
    for call in (attention(mask), ours):
        error = truth.error(truth.of_call(call))
        assert 0 < error <= 1
    assert 0 < truth.error(truth.of_call(attention()), is_dense=True) <= 1


@DIRECTIONS
@pytest.mark.parametrize("problem", [LONE, SMALL["Swin, blocks of 7x7"]], ids=["lone", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_of_one_key_and_a_longer_grid(dtype, problem, gradients):
    """Of one key plain arithmetic has no error at all."""
    truth = Truth(problem, inputs(problem, CPU, dtype), gradients)
    assert truth.error(truth.of_call(PROVIDERS['gnaflex, "sdpa"'](problem, CPU).call)) <= 1
    assert truth.error(truth.of_call(attention())) > 1


@DIRECTIONS
@SOME
def test_it_knows_better_than_the_dtype(name, gradients):
    """Attention in float64, of tensors and a cotangent in bfloat16, has no error."""
    truth, mask = truth_of(name, gradients)
    rows, cotangents = truth.rows, []

    def call(q, k, v):
        out = attention(mask)(q, k, v)
        if gradients:
            out.register_hook(cotangents.append)
        return out

    truth.of_call(call)
    leaves = [x.double().requires_grad_() for x in truth.tensors]
    out = attention(mask)(*leaves)
    if not gradients:
        assert truth.error((out[:, :, rows],)) < 1e-9
        return
    dq, dk, dv = torch.autograd.grad(out, leaves, cotangents[0].double())
    assert truth.error((dq[:, :, rows], dk, dv)) < 1e-9


# ---- wrong ones --------------------------------------------------------------------------------------


@SOME
def test_dense_attention_is_something_else(name):
    for gradients in (False, True):
        truth, mask = truth_of(name, gradients)
        assert truth.error(truth.of_call(attention())) > 1
        assert truth.error(truth.of_call(attention(mask)), is_dense=True) > 1


def zeroed(out, row):
    out[:, 1, row] = 0


def not_a_number(out, row):
    out[0, 0, row, -1] = math.nan


def infinite(out, row):
    out[0, 1, row, 0] = -math.inf


def of_another_query(out, row):
    out[:, :, row] = out[:, :, row - 1]


@pytest.mark.parametrize("spoil", [zeroed, not_a_number, infinite, of_another_query])
@SOME
def test_a_wrong_row_is_found(name, spoil):
    truth, mask = truth_of(name, False)
    out = attention(mask)(*truth.tensors)
    least = 1e100 if spoil in (not_a_number, infinite) else 1
    for row in truth.rows.tolist()[::11]:
        wrong = out.clone()
        spoil(wrong, row)
        assert truth.error(truth.of_call(lambda q, k, v, wrong=wrong: wrong)) > least


@DIRECTIONS
@SOME
def test_a_key_that_is_left_out_is_found(name, gradients):
    """Of one query, the key that weighs most."""
    truth, mask = truth_of(name, gradients)
    q, k, _ = (x.double() for x in truth.tensors)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf).softmax(-1)[0].amax(0)
    for row in truth.rows.tolist()[3::11]:
        fewer = mask.clone()
        fewer[row, weights[row].argmax()] = False
        assert truth.error(truth.of_call(attention(fewer))) > 1


@DIRECTIONS
@SOME
def test_a_key_too_many_is_found(name, gradients):
    truth, mask = truth_of(name, gradients)
    row = next(row for row in truth.rows.tolist() if not mask[row].all())
    more = mask.clone()
    more[row] = True
    assert truth.error(truth.of_call(attention(more))) > 1


@pytest.mark.parametrize("which", range(3), ids=["dq", "dk", "dv"])
@SOME
def test_one_wrong_gradient_is_found(name, which):
    truth, mask = truth_of(name, True)
    found = truth.of_call(attention(mask))
    assert truth.error(found) <= 1
    at = tuple(i.item() for i in torch.unravel_index(found[which].abs().argmax(), found[which].shape))
    for wrong in (0.0, 0.9 * found[which][at].item(), math.nan):
        spoilt = [x.clone() for x in found]
        spoilt[which][at] = wrong
        assert truth.error(tuple(spoilt)) > 1


def test_what_is_not_finite_is_infinitely_wrong():
    truth, mask = truth_of("grid", True)
    dq, dk, dv = truth.of_call(attention(mask))
    for wrong in (math.nan, math.inf, -math.inf):
        assert truth.error((dq, dk.index_fill(2, torch.tensor(3), wrong), dv)) > 1e100


def test_gradients_are_of_the_tensors_that_are_given():
    """Nothing is left on them for the provider that comes next."""
    truth, mask = truth_of("grid", True)
    before = [x.clone() for x in truth.tensors]
    first, again = (truth.of_call(attention(mask)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for x, was in zip(truth.tensors, before, strict=True):
        assert x.grad is None
        assert not x.requires_grad
        assert torch.equal(x, was)


def test_forward_needs_no_gradient():
    truth, mask = truth_of("grid", False)
    seen = []
    truth.of_call(lambda q, k, v: seen.append(torch.is_grad_enabled()) or attention(mask)(q, k, v))
    assert seen == [False]
