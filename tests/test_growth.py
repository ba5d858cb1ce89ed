"""How cost grows with tokens: every subject's points, where a walk ends and why, and the exponents."""

from __future__ import annotations

import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from gnaflex.cuda_backend import fast_path

import gnaflex
from benchmarks import engine, growth
from benchmarks.growth import Subject, exponent, walk
from benchmarks.providers import CannotRun
from gnaflex.spec import GNA

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(growth, "SIZES", ((4, 8, 8), (4, 8, 16), (4, 16, 16), (8, 16, 16)))
    monkeypatch.setattr(growth, "RUNS_S", 0.05)


@pytest.fixture
def costs(monkeypatch):
    """What a call takes, as functions of its tokens, on a clock of its own; ``calls`` lists those made."""
    found = SimpleNamespace(seconds=lambda n: 0.001, mib=lambda n: 1.0, calls=[], now=0.0)

    def make(spec, device):
        found.tokens = spec.num_tokens
        return call

    def call():
        found.calls.append(found.tokens)
        found.now += found.seconds(found.tokens)
        return SimpleNamespace(lists=torch.zeros(3))

    def seconds(call, device):
        start = found.now
        call()
        return found.now - start

    monkeypatch.setattr(growth, "seconds", seconds)
    monkeypatch.setattr(growth, "peak_mib", lambda call, device: (call(), found.mib(found.tokens))[1])
    monkeypatch.setattr(growth, "available_mib", lambda device: 1000.0)
    monkeypatch.setattr(growth, "time", SimpleNamespace(monotonic=lambda: found.now))
    found.subject = Subject("somebody", make)
    return found


def tokens_of(points):
    return [one.tokens for one in points]


# ---- subjects ----------------------------------------------------------------------------------------


def test_the_sizes_double_from_a_thousand_to_more_than_a_million(monkeypatch):
    monkeypatch.undo()
    tokens = [math.prod(shape) for shape in growth.SIZES]
    assert (tokens[0], tokens[-1]) == (1024, 1_179_648)
    assert all(2 <= b / a <= 2.25 for a, b in itertools.pairwise(tokens))


def test_a_gpu_has_one_subject_more_which_is_block_sparse():
    extra = growth.items(GPU).keys() - growth.items(CPU).keys()
    (subject,) = (one for one in growth.subjects(GPU) if one.name in extra)
    assert subject.name.startswith('gnaflex, "cuda"')
    assert fast_path.Problem(GNA((16, 32, 32), growth.WINDOW, subject.stride)).boxes is not None
    assert not subject.is_mask


@pytest.mark.parametrize(
    "name", ["block_mask, tile-major", "block_mask, row-major", "create_block_mask, eager"]
)
def test_a_mask_is_made_at_every_size(name):
    points = [*growth.items(CPU)[name].measure()]
    assert tokens_of(points) == [256, 512, 1024, 2048]
    for one in points:
        assert (one.subject, one.why) == (name, None)
        assert one.low <= one.ms <= one.high
        assert 1 <= one.runs <= growth.RUNS
    square = 4 * (2048 // 128) ** 2  # bytes of one list as wide as the mask; torch's masks have four
    assert (points[-1].mib * MIB > 4 * square) == ("eager" in name)


@pytest.mark.parametrize("order, tile", [("tile-major", growth.TILE), ("row-major", None)])
def test_compact_lists_are_those_of_block_mask(order, tile):
    points = [*growth.items(CPU)[f"block_mask, {order}"].measure()]
    bm = gnaflex.block_mask(growth.SIZES[-1], growth.WINDOW, q_tile=tile, device="cpu", full_width=False)
    held = sum(x.numel() * x.element_size() for x in vars(bm).values() if isinstance(x, torch.Tensor))
    assert points[-1].mib * MIB == held


@pytest.mark.parametrize("name", ['gnaflex, "sdpa"', "dense, flash"])
def test_attention_is_timed_at_every_size(name):
    points = [*growth.items(CPU)[name].measure()]
    assert tokens_of(points) == [256, 512, 1024, 2048]
    assert all(one.ms > 0 and one.mib is None and one.why is None for one in points)


def test_one_of_torchs_masks_is_made_by_a_compiled_function_for_one_size(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda made, **how: seen.append((made, how)) or made)
    for name in ("compiled", "eager"):
        assert len([*growth.items(CPU)[f"create_block_mask, {name}"].measure()]) == 4
    assert seen == [(growth.create_block_mask, {"dynamic": False})] * 4


def test_attention_is_timed_by_the_clock_of_the_device_and_masks_by_that_of_the_host(costs, monkeypatch):
    rounds = []

    def milliseconds(calls, n, device):
        rounds.append((n, device))
        return {key: [7.0] for key in calls}

    monkeypatch.setattr(growth, "milliseconds", milliseconds)
    waits = []
    seconds = growth.seconds
    monkeypatch.setattr(growth, "seconds", lambda call, device: waits.append(device) or seconds(call, device))
    assert [one.ms for one in walk(costs.subject, CPU)] == pytest.approx([1.0] * 4)
    assert (rounds, waits) == ([], [CPU] * 4 * (1 + growth.RUNS))
    assert [one.ms for one in walk(costs.subject._replace(is_mask=False), CPU)] == [7.0] * 4
    assert rounds == [({"": growth.RUNS}, CPU)] * 4


def test_more_sizes_are_compiled_than_dynamo_remembers(monkeypatch):
    monkeypatch.setattr(growth, "SIZES", tuple((n, 8, 8) for n in range(4, 16)))

    def make(spec, device):
        double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False, fullgraph=True)
        return lambda: double(torch.ones(spec.num_tokens))

    points = [*walk(Subject("somebody", make, is_mask=False), CPU)]
    assert [one.why for one in points] == [None] * 12


def test_rows_go_through_a_results_file():
    (row, *_) = (engine.as_json(one) for one in growth.items(CPU)["block_mask, row-major"].measure())
    assert row.keys() == {"subject", "tokens", "ms", "low", "high", "runs", "mib", "peak_mib"}


# ---- where a walk ends -------------------------------------------------------------------------------


def test_a_walk_takes_every_size_that_is_cheap(costs):
    assert tokens_of(walk(costs.subject, CPU)) == [256, 512, 1024, 2048]
    assert [one.why for one in walk(costs.subject, CPU)] == [None] * 4


def test_a_walk_ends_before_a_call_that_takes_too_long(costs):
    costs.seconds = lambda n: 6 * (n / 1024) ** 2
    *points, last = walk(costs.subject, CPU)
    assert tokens_of(points) == [256, 512, 1024]
    assert (last.tokens, last.ms) == (2048, None)
    assert last.why == "a call would take 24 s; the limit is 10 s"
    assert 2048 not in costs.calls


def test_a_walk_ends_before_a_size_that_takes_half_of_the_memory(costs):
    costs.mib = lambda n: 200 * (n / 1024) ** 2
    *points, last = walk(costs.subject, CPU)
    assert tokens_of(points) == [256, 512, 1024]
    assert "GiB" in last.why
    assert 2048 not in costs.calls


@pytest.mark.parametrize("one_of_two", [0, 1])
def test_first_and_later_calls_count_for_the_memory(costs, monkeypatch, one_of_two):
    asked = itertools.count()
    large = lambda: 200 * (costs.tokens / 1024) ** 2 if next(asked) % 2 == one_of_two else 1.0  # noqa: E731
    monkeypatch.setattr(growth, "peak_mib", lambda call, device: (call(), large())[1])
    *points, last = walk(costs.subject, CPU)
    assert tokens_of(points) == [256, 512, 1024]
    assert (points[-1].peak_mib == 1.0) == (one_of_two == 0)
    assert "GiB" in last.why


def test_a_walk_ends_in_time_whatever_takes_it(costs, monkeypatch):
    monkeypatch.setattr(growth, "WALK_S", 60.0)
    costs.seconds = lambda n: 4.5  # twice a size
    assert tokens_of(walk(costs.subject, CPU)) == [256, 512, 1024, 2048]
    monkeypatch.setattr(growth, "WALK_S", 30.0)
    *points, last = walk(costs.subject, CPU)
    assert tokens_of(points) == [256, 512]
    assert last.why == "first call and runs would take 18 s, after 18 s of 30 s"


def test_a_prediction_follows_the_last_two_sizes_within_bounds(costs):
    noisy = {256: 0.001, 512: 0.4, 1024: 0.3, 2048: 0.3}  # a jump of 400 is none of the work
    costs.seconds = noisy.__getitem__
    assert tokens_of(walk(costs.subject, CPU)) == [256, 512, 1024, 2048]
    costs.seconds = {256: 7.0, 512: 6.0}.__getitem__  # less than before is noise too: 12 s
    *points, last = walk(costs.subject, CPU)
    assert (tokens_of(points), last.why) == ([256, 512], "a call would take 12 s; the limit is 10 s")


def test_a_call_may_seem_to_take_no_memory(costs):
    costs.mib = {256: 0.0, 512: 0.0, 1024: 100.0, 2048: 0.0}.__getitem__
    assert tokens_of(walk(costs.subject, CPU)) == [256, 512, 1024, 2048]


@pytest.mark.parametrize(
    "error, why", [(CannotRun("no such machine"), "no such machine"), (ValueError("a  b"), "ValueError: a b")]
)
def test_a_walk_ends_where_a_subject_fails(costs, error, why):
    def seconds(n):
        if n == 1024:
            raise error
        return 0.001

    costs.seconds = seconds
    *points, last = walk(costs.subject, CPU)
    assert tokens_of(points) == [256, 512]
    assert (last.tokens, last.why) == (1024, why)


def test_runs_are_as_many_as_there_is_time_for(costs):
    costs.seconds = {256: 0.001, 512: 0.02, 1024: 0.06, 2048: 0.06}.__getitem__
    assert [one.runs for one in walk(costs.subject, CPU)] == [5, 2, 1, 1]
    first_and_peak = [costs.calls.count(n) for n in (256, 512, 1024)]
    assert first_and_peak == [7, 4, 2]


def test_memory_that_is_there_is_some_of_this_machine():
    assert 1 < growth.available_mib(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB


# ---- exponents ---------------------------------------------------------------------------------------


def rows(law, sizes=(1, 2, 4, 8, 16, 32, 64), field="ms"):
    return [{"subject": "somebody", "tokens": n, field: law(n)} for n in sizes]


def test_an_exponent_is_that_of_a_power_law():
    assert exponent(rows(lambda n: 3 * n**1.5)) == pytest.approx(1.5)
    assert exponent(rows(lambda n: 7 / n, field="peak_mib"), "peak_mib") == pytest.approx(-1)


def test_an_exponent_is_of_the_upper_half_in_any_order():
    found = rows(lambda n: n**2 if n >= 8 else 64)
    assert exponent(found) == pytest.approx(2)
    assert exponent(found[::-1]) == pytest.approx(2)
    assert exponent(rows(lambda n: n**2 if n > 8 else 256)) < 1.9


def test_of_few_points_an_exponent_takes_three():
    assert exponent(rows(lambda n: 9 if n == 1 else n, (1, 2, 4, 8))) == pytest.approx(1)
    assert exponent(rows(lambda n: n, (1, 2))) is None
    assert exponent([]) is None


def test_an_exponent_leaves_out_what_has_no_figure():
    found = [*rows(lambda n: n, (1, 2, 4)), {"subject": "somebody", "tokens": 8, "why": "too long"}]
    assert exponent(found) == pytest.approx(1)
    assert exponent(found, "peak_mib") is None
    assert exponent([*rows(lambda n: 0.0, (1, 2)), *rows(lambda n: n, (4, 8))]) is None
