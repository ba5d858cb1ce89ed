"""What a comparison reports, by providers whose calls take as long as a clock of the test says."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from gnaflex.cuda_backend import fast_path
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import comparison, measure, truth
from benchmarks.comparison import Facts, Timing, compare, facts_of, inputs
from benchmarks.problems import Problem
from benchmarks.providers import CannotRun, Ready
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA

CPU = torch.device("cpu")
ONE = Problem("one", GNA((16, 32), (4, 8), (4, 8)), 2, 10, 16)
TRAINS = replace(ONE, trains=True)
MASK = dense_mask(ONE.spec)
FLASH, EFFICIENT = "dense, flash", "dense, efficient"
MEASURED = ("ms", "low", "high", "runs", "mask_ms", "first_s", "error", "peak_mib", "speedup", "achievable")


class Clock:
    """Time that passes only when a provider says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    it = Clock()
    for module in (comparison, measure):
        monkeypatch.setattr(module, "time", it)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    return it


class Costs(torch.autograd.Function):
    """The identity, whose backward takes a while."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.cost = clock, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        clock, seconds = ctx.cost
        clock.now += seconds
        return gradient, None, None


class Fake:
    """A provider of plain attention under a mask. ``forward`` are the seconds of its calls one after the
    other, the last ones all alike; ``making`` those before the first; ``fails`` the error of a call by its
    number; ``wrong`` whether what it gives is, "forward" or "backward"."""

    def __init__(
        self, clock, *forward, backward=0.0, mask=None, making=0.0, fails=None, wrong="", seen=MASK, **ready
    ):
        self.clock, self.forward, self.backward, self.mask, self.making = (
            clock,
            forward,
            backward,
            mask,
            making,
        )
        self.fails, self.wrong, self.seen, self.ready = fails or {}, wrong, seen, ready
        self.calls = self.masks = 0

    def __call__(self, problem, device):
        assert device == CPU
        self.clock.now += self.making
        return Ready(self.call, None if self.mask is None else self.make_mask, **self.ready)

    def call(self, q, k, v):
        self.clock.now += self.forward[min(self.calls, len(self.forward) - 1)]
        if error := self.fails.get(self.calls):
            raise error
        self.calls += 1
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.seen)
        if not q.requires_grad:
            return out * 1.5 if self.wrong == "forward" else out
        if self.wrong == "backward":
            out = 2 * out - out.detach()
        return Costs.apply(out, self.clock, self.backward)

    def make_mask(self):
        self.clock.now += self.mask[min(self.masks, len(self.mask) - 1)]
        self.masks += 1


def dense(clock, *forward, **more):
    return Fake(clock, *forward, seen=None, **more)


def compared(providers, problem=ONE):
    """Timings by provider and direction."""
    facts, *timings = compare("some", problem, CPU, torch.float32, providers)
    assert isinstance(facts, Facts)
    assert all(isinstance(one, Timing) and one.problem == "some" for one in timings)
    found = {(one.provider, one.direction): one for one in timings}
    assert len(found) == len(timings)
    directions = ("forward", "backward", "both") if problem.trains else ("forward",)
    assert {*found} == {*itertools.product(providers, directions)}
    return found


# ---- what is measured ----------------------------------------------------------------------------------


def test_a_time_is_a_median_of_rounds(clock):
    """The first two calls are none of them; nor are the last check, and the one whose memory is read."""
    times = 9.0, 0.5, *(1.0, 3.0, 2.0), 7.0, 8.0
    provider = Fake(clock, *times, making=4.0, mask=(5.0, 0.25, 0.125))
    one = compared({"it": provider})["it", "forward"]
    assert (one.ms, one.low, one.high, one.runs) == (2000, 1000, 3000, 3)
    assert one.first_s == 13
    assert (one.mask_ms, provider.masks) == (125 * 2, 3 + 1)
    assert 0 < one.error <= 1
    assert provider.calls == len(times)
    assert one.why is one.speedup is one.achievable is one.predicted_ms is None
    if sys.platform == "linux":
        assert one.peak_mib >= 0
        assert one.mask_peak_mib >= 0


@pytest.mark.parametrize(
    "seconds, rounds", [(2**-10, 15), (0.125, 12), (0.25, 6), (0.375, 4), (0.5, 3), (4.0, 3)]
)
def test_how_often(clock, seconds, rounds):
    provider = Fake(clock, seconds)
    assert compared({"it": provider})["it", "forward"].runs == rounds
    assert provider.calls == 2 + rounds + 2


def test_providers_take_turns(clock):
    order = []
    providers = {name: Fake(clock, 1.0) for name in "abc"}
    for name, one in providers.items():
        one.call = lambda *x, one=one, name=name: order.append(name) or Fake.call(one, *x)
    compared(providers)
    assert "".join(order) == "aabbcc" + 3 * "abc" + "aabbcc"


def test_directions(clock):
    found = compared({"it": Fake(clock, 0.5, backward=2.0)}, TRAINS)
    assert [found["it", direction].ms for direction in ("forward", "backward", "both")] == [500, 2000, 2500]
    assert [found["it", direction].runs for direction in ("forward", "backward", "both")] == [3, 3, 3]
    assert found["it", "backward"].first_s == found["it", "both"].first_s == 2.5
    assert found["it", "forward"].first_s == 0.5


@pytest.mark.parametrize("compiles, calls", [(True, 2), (False, 1)])
def test_a_slow_call_is_not_repeated(clock, compiles, calls):
    slow, quick = Fake(clock, 8.0, compiles=compiles, mask=(0.5,)), Fake(clock, 1.0)
    found = compared({"slow": slow, "quick": quick, FLASH: dense(clock, 2.0)})
    one = found["slow", "forward"]
    assert slow.calls == calls
    assert (one.ms, one.low, one.high, one.runs, one.first_s) == (8000, 8000, 8000, 1, 8)
    assert one.peak_mib is None
    assert one.mask_ms == 500
    assert one.speedup == 2000 / 8050
    assert (found["quick", "forward"].runs, found["quick", "forward"].speedup) == (3, 2)


def test_a_slow_first_call_is_no_measurement_of_what_compiles(clock):
    assert compared({"it": Fake(clock, 60.0, 1.0, compiles=True)})["it", "forward"].ms == 1000


def test_how_slow_is_slow(clock, monkeypatch):
    monkeypatch.setattr(comparison, "SLOW_S", 0.25)
    found = compared({"at": Fake(clock, 0.25), "above": Fake(clock, 0.5)})
    assert [found[name, "forward"].runs for name in ("at", "above")] == [6, 1]


def test_backward_of_a_slow_one_is_not_known_alone(clock):
    found = compared({"slow": Fake(clock, 1.0, backward=7.0), FLASH: dense(clock, 1.0, backward=2.0)}, TRAINS)
    assert found["slow", "backward"].why == "forward and backward take 8 s: too long to time backward alone"
    assert found["slow", "backward"].ms is None
    assert (found["slow", "both"].ms, found["slow", "both"].runs) == (8000, 1)
    assert found["slow", "both"].speedup == 3 / 8
    assert found["slow", "forward"].ms == 1000


def test_slow_dense_attention_makes_no_backward_look_fast(clock):
    found = compared({FLASH: dense(clock, 1.0, backward=7.0), "it": Fake(clock, 1.0, backward=2.0)}, TRAINS)
    assert found["it", "backward"].ms == 2000
    assert found["it", "backward"].speedup is None
    assert found["it", "both"].speedup == 8 / 3


# ---- what does not run -----------------------------------------------------------------------------------


def test_a_wrong_one_is_not_timed(clock):
    wrong = Fake(clock, 1.0, wrong="forward")
    found = compared({"wrong": wrong, FLASH: Fake(clock, 1.0), "right": Fake(clock, 1.0)})
    for name in ("wrong", FLASH):  # dense attention that is not
        one = found[name, "forward"]
        assert one.why.startswith("WRONG: its error is ")
        assert one.why.endswith(" times what torch.float32 may have")
        assert all(getattr(one, field) is None for field in MEASURED)
    assert wrong.calls == 1
    assert found["right", "forward"].ms == 1000
    assert found["right", "forward"].speedup is None


@pytest.mark.parametrize(
    "error, why", [(1.0, None), (1.01, "WRONG: its error is 1.01 times what torch.float32 may have")]
)
def test_how_wrong_is_wrong(clock, monkeypatch, error, why):
    """And what is held against it is no part of its time."""

    def held(truth, found, is_dense):
        clock.now += 100
        return error

    monkeypatch.setattr(comparison.Truth, "error", held)
    one = compared({"it": Fake(clock, 1.0)})["it", "forward"]
    assert (one.why, one.first_s, one.error) == (why, None if why else 1, None if why else error)


def test_only_its_gradients_may_be_wrong(clock):
    found = compared({"it": Fake(clock, 1.0, wrong="backward")}, TRAINS)
    assert found["it", "forward"].ms == 1000
    for direction in ("backward", "both"):
        assert found["it", direction].why.startswith("WRONG: ")
        assert found["it", direction].ms is None


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "error, why, is_traced",
    [
        (CannotRun("no such\n  GPU"), "no such\n  GPU", False),
        (RuntimeError("a\n  b " + 400 * "c"), f"RuntimeError: a b {296 * 'c'}", True),
        (torch.OutOfMemoryError("all of it"), "OutOfMemoryError: all of it", True),
    ],
    ids=["refusal", "error", "memory"],
)
def test_one_that_raises_is_a_line(clock, capsys, error, why, is_traced, number):
    found = compared({"it": Fake(clock, 1.0, fails={number: error}), "other": Fake(clock, 1.0)})
    assert found["it", "forward"] == Timing("some", "it", "forward", why)
    assert found["other", "forward"].ms == 1000
    assert ("Traceback" in capsys.readouterr().err) == is_traced


def test_one_that_cannot_be_made_is_a_line(clock):
    def refuse(problem, device):
        raise CannotRun("not installed")

    found = compared({"it": refuse, "other": Fake(clock, 1.0)}, TRAINS)
    assert {found["it", direction].why for direction in ("forward", "backward", "both")} == {"not installed"}
    assert found["other", "both"].ms == 1000


def test_a_crash_of_the_machine_is_nobody_s_line(clock):
    with pytest.raises(KeyboardInterrupt):
        compared({"it": Fake(clock, 1.0, fails={0: KeyboardInterrupt()})})


# ---- against dense attention -------------------------------------------------------------------------------


def test_speedup_is_over_the_best_dense_one_with_a_share_of_the_mask(clock):
    bound = ONE.work_speedup
    assert bound > 1.5
    found = compared({
        FLASH: dense(clock, 3.0), EFFICIENT: dense(clock, 2.0, speedup=9.0),
        "masked": Fake(clock, 0.5, mask=(1.25,), speedup=5.0), "bare": Fake(clock, 0.5),
    })  # fmt: skip
    masked, bare = found["masked", "forward"], found["bare", "forward"]
    assert masked.speedup == pytest.approx(2000 / (500 + 1250 / ONE.layers))
    assert masked.achievable == pytest.approx(masked.speedup / bound)
    assert masked.predicted_ms == 2000 / 5
    assert (bare.speedup, bare.achievable, bare.predicted_ms) == (4, pytest.approx(4 / bound), None)
    for name in (FLASH, EFFICIENT):
        one = found[name, "forward"]
        assert one.ms in (2000, 3000)
        assert one.speedup is one.achievable is one.predicted_ms is one.mask_ms is None


def test_a_prediction_is_of_forward_alone(clock):
    providers = {FLASH: dense(clock, 1.0, backward=2.0), "it": Fake(clock, 0.5, backward=0.5, speedup=3.0)}
    found = compared(providers, TRAINS)
    directions = "forward", "backward", "both"
    assert [found["it", one].speedup for one in directions] == [2, 4, 3]
    assert [found["it", one].predicted_ms for one in directions] == [pytest.approx(1000 / 3), None, None]


def test_without_dense_attention_nothing_is_compared(clock):
    for more in ({}, {FLASH: dense(clock, 1.0, fails={0: CannotRun("no")})}):
        one = compared({"it": Fake(clock, 1.0, speedup=3.0), **more})["it", "forward"]
        assert one.ms == 1000
        assert one.speedup is one.achievable is one.predicted_ms is None


# ---- facts, and what providers are given -----------------------------------------------------------------


MORE = (
    replace(ONE, prefix=5, suffix=9),
    replace(ONE, spec=GNA((7, 9), 3)),
    replace(ONE, spec=GNA(40, 9, 2, 2, True)),
)


@pytest.mark.parametrize("problem", [ONE, *MORE], ids=lambda one: str(one.facts))
def test_facts(problem):
    facts = facts_of("some", problem, torch.bfloat16)
    pairs = dense_mask(problem.spec, prefix=problem.prefix, suffix=problem.suffix)
    assert (facts.problem, facts.facts, facts.dtype) == ("some", problem.facts, "bfloat16")
    assert facts.tokens == len(pairs)
    assert facts.flop_speedup == pytest.approx(pairs.numel() / pairs.sum().item())
    assert facts.work_speedup == problem.work_speedup
    assert facts.block_sparse == (fast_path.Problem(problem.spec).boxes is not None)


def test_inputs_lie_as_models_make_them():
    first, again = (inputs(ONE, CPU, torch.bfloat16) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
        assert (a.shape, a.dtype) == ((1, 2, 512, 16), torch.bfloat16)
        assert a.transpose(1, 2).is_contiguous()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_no_provider_finds_what_another_left(clock):
    """Neither gradients nor marks on the tensors of the comparison."""
    given = []

    class Looks(Fake):
        def call(self, q, k, v):
            given.append((torch.is_grad_enabled(), q.requires_grad, q.grad, q))
            return super().call(q, k, v)

    compared({"a": Looks(clock, 1.0), "b": Looks(clock, 1.0)}, TRAINS)
    assert {(enabled, needs) for enabled, needs, *_ in given} == {(False, False), (True, True)}
    assert {one.is_leaf and grad is None for _, _, grad, one in given} == {True}


def test_the_first_to_compile_pays_nothing_for_it(clock, monkeypatch):
    """What torch.compile takes in a process that has not compiled yet is over before anyone is timed."""

    def compile(f, **_):
        clock.now += 100
        return f

    monkeypatch.setattr(torch, "compile", compile)
    found = compared({"it": Fake(clock, 1.0)})
    assert clock.now > 100
    assert found["it", "forward"].first_s == 1


def test_times_are_waited_for(clock, monkeypatch):
    waited = []
    for module in (comparison, measure):
        monkeypatch.setattr(module, "finished", waited.append)
    compared({"it": Fake(clock, 1.0, mask=(1.0,))})
    assert waited == [CPU] * (1 + 1 + comparison.MASKS + 2)  # and before the peaks are read


# ---- what goes wrong late ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 4, 5, 6], ids=["timed first", "timed last", "checked again", "memory"])
def test_a_late_failure_takes_nobody_along(clock, at):
    providers = {FLASH: dense(clock, 0.5), "bad": Fake(clock, 0.5, fails={at: RuntimeError("out of luck")}),
                 "good": Fake(clock, 0.25)}  # fmt: skip
    found = compared(providers)
    bad, good = (found[name, "forward"] for name in ("bad", "good"))
    assert (bad.why, bad.ms) == ("RuntimeError: out of luck", None)
    assert (good.why, good.ms, good.speedup) == (None, 250, 2)


def test_a_dense_call_that_fails_late_is_no_yardstick(clock):
    providers = {FLASH: dense(clock, 0.125, fails={3: RuntimeError("no")}), EFFICIENT: dense(clock, 1.0),
                 "it": Fake(clock, 0.5)}  # fmt: skip
    found = compared(providers)
    assert found[FLASH, "forward"].why == "RuntimeError: no"
    assert found["it", "forward"].speedup == 2


def test_a_result_that_changes_later_is_wrong(clock):
    provider = Fake(clock, 0.5)
    right = provider.call
    provider.call = lambda *x: right(*x) * (3 if provider.calls > 4 else 1)
    assert compared({"it": provider})["it", "forward"].why.startswith("WRONG: its error is ")


def test_inputs_must_stay(clock):
    class Zeroes(Fake):
        def call(self, q, k, v):
            out = super().call(q, k, v)
            k.detach().zero_()
            return out

    found = compared({"it": Zeroes(clock, 0.5), "other": Fake(clock, 0.5)}, TRAINS)
    assert found["it", "forward"].why == "WRONG: it writes into q, k or v"
    assert "modified by an inplace operation" in found["it", "both"].why  # autograd is first
    assert [found["other", direction].why for direction in ("forward", "backward", "both")] == [None] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_checked_must_be_finite(clock, bad):
    provider = Fake(clock, 0.5)
    right = provider.call
    row = next(row for row in range(512) if row not in truth.rows_of(ONE))

    def call(*x):
        out = right(*x).clone()
        out[:, :, row] = bad
        return out

    provider.call = call
    assert (
        compared({"it": provider})["it", "forward"].why
        == "WRONG: its error is inf times what torch.float32 may have"
    )


def test_backward_alone_needs_no_mask(clock):
    found = compared(
        {FLASH: dense(clock, 0.5, backward=1.0), "it": Fake(clock, 0.5, backward=1.0, mask=(10.0,))}, TRAINS
    )
    assert found["it", "backward"].speedup == 1
    assert found["it", "both"].speedup == pytest.approx(1.5 / 2.5)
