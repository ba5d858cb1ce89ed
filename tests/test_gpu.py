"""Kernels where there is a GPU that runs them: values, layouts, graphs, streams, compiled functions.

Without one everything here is skipped. The checks take a device: test_gpu_suite.py runs them on a CPU, with a
stand-in for the kernels. The kernels are those of benchmarks.gpu_items, which a machine without CuTe DSL has
linked: GNAFLEX_KERNELS=FOLDER python -m pytest -o addopts=-rs -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import itertools
import math
import random
import time
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from gnaflex.cuda_backend import gate, machine, proof
from gnaflex.cuda_backend.config import BOXES_AT_ONCE
from gnaflex.cuda_backend.fast_path import Lane, Problem, layout_obstacle, of_plan
from gnaflex.cuda_backend.tile_walk import Q_ROWS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import gnaflex
from benchmarks import gpu_items
from gnaflex import door, lanes, operators
from gnaflex.planner import Plan
from gnaflex.spec import GNA
from gnaflex.trial import BUDGET, LSE_ERROR, Case, allowed, exactly

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
CONFIGS = [config for config in gpu_items.configs() if not config.loads_only]
RANDOM, RANDOM_S = 1000, 90.0  # problems, seconds; of all kernels together
GUARD = 4096  # elements on both sides of an output
RAGGED, TILES = GNA((5, 24, 41), (4, 8, 8), (2, 8, 8)), GNA((32, 80), (24, 48), (8, 16))
SMALL = GNA((4, 24, 40), (2, 8, 8), (2, 8, 8))
DOOR = [  # problems whose boxes give kernels of CONFIGS
    (torch.bfloat16, 128, Problem(RAGGED)),
    (torch.bfloat16, 64, Problem(RAGGED)),
    (torch.bfloat16, 128, Problem(RAGGED, suffix=37)),
    (torch.float16, 128, Problem(RAGGED, 5, 130, 9)),
    (torch.bfloat16, 128, Problem(TILES)),
    (torch.float16, 64, Problem(TILES, prefix=40)),
    (torch.bfloat16, 128, Problem(GNA((4, 12, 48), (4, 8, 16), (1, 8, 16)))),
    (torch.bfloat16, 128, Problem(GNA((2, 12, 48), (2, 12, 48)))),
    (torch.bfloat16, 128, Problem(GNA((1000,), (256,), (128,)))),
    (torch.bfloat16, 128, Problem(SMALL)),
    (torch.bfloat16, 128, Problem(SMALL, suffix=40)),
]


def no_gpu():
    """Why nothing here runs, or ""."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return machine.obstacle(DEVICE)


@pytest.fixture(autouse=True)
def _gpu():
    if why := no_gpu():
        pytest.skip(why)


@lru_cache(maxsize=32)
def kernel(config):
    return gate.load(config)


@pytest.fixture
def launched(monkeypatch):
    """How often kernels were launched through the door so far; they are trusted, as values are compared."""
    log, load = [], gate.load

    def counted(config):
        launcher = load(config)
        return lambda *numbers: log.append(config) or launcher(*numbers)

    monkeypatch.setenv(proof.SWITCH, "trust")
    monkeypatch.setattr(gate, "_launchers", {})
    monkeypatch.setattr(gate, "load", counted)
    forget()
    yield lambda: len(log)
    forget()


def forget():
    """What holds kernels that ran."""
    door._problem.cache_clear()
    lanes._of_owner.clear()
    operators._mask.cache_clear()
    torch._dynamo.reset()


# ---- a kernel and exact attention --------------------------------------------------------------------


class Try(NamedTuple):
    """A problem and tensors: how they lie in memory, and the size of queries and keys. ``valid``: [batch or
    1, runs of extra tokens that there are]."""

    problem: Problem
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    layout: str = "contiguous"
    valid: Any = None
    scale: float | None = None
    size: float = 1.0


LAYOUTS = {
    "contiguous": lambda make, b, h, n, d: make(b, h, n, d),
    "heads last": lambda make, b, h, n, d: make(b, n, h, d).transpose(1, 2),
    "packed": lambda make, b, h, n, d: make(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
    "padded": lambda make, b, h, n, d: make(b + 1, h, n + 3, d + 8)[1:, :, 2:-1, :d],
    "expanded": lambda make, b, h, n, d: make(1, 1, n, d).expand(b, h, -1, -1),
}


def tensors(one, dtype, head_dim, device, seed=0):
    """Queries, keys and values [batch, heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    queries = one.problem.spec.num_tokens + one.problem.prefix + one.problem.suffix
    keys = queries + one.problem.extra_kv
    sizes = (one.heads, queries, one.size), (one.kv_heads, keys, one.size), (one.kv_heads, keys, 1.0)
    out = []
    for heads, rows, size in sizes:

        def make(*sizes, size=size):
            return (size * torch.randn(*sizes, generator=generator)).to(device, dtype)

        out.append(LAYOUTS[one.layout](make, one.batch, heads, rows, head_dim))
    return out


class Guarded(Lane):
    """Outputs lie between guards, in memory full of NaN."""

    def _empty(self, query):
        out = super()._empty(query)
        self.room = torch.full((out.numel() + 2 * GUARD,), math.nan, dtype=out.dtype, device=out.device)
        return self.room.as_strided(out.shape, out.stride(), GUARD)


def check(config, launcher, one, device, seed=0):
    """A kernel writes every row and nothing else, the same twice, and is as exact as torch's own."""
    tokens = tensors(one, getattr(torch, config.dtype), config.head_dim, device, seed)
    assert not [why for x in tokens if (why := layout_obstacle("tensor", x))]
    before = [x.clone() for x in tokens]
    plan = Plan(one.problem.spec, config.q_box, config.kv_box, "dynamic", Q_ROWS)
    launches, valid = of_plan(one.problem, plan, device, BOXES_AT_ONCE[config.arch])
    if one.valid is not None:
        valid = torch.tensor(one.valid, dtype=torch.int32, device=device)
    lane = Guarded(*tokens, launches, launcher, one.scale, valid)
    out, lse = run_on_poison(lane, tokens)
    assert all(map(torch.equal, tokens, before)), "an input has changed"
    again = run_on_poison(lane, tokens)
    assert torch.equal(out, again[0]), "two runs differ"
    assert torch.equal(lse, again[1]), "the log-sum-exp of two runs differs"
    assert_exact(one, tokens, out, lse)


def run_on_poison(lane, tokens):
    """Output and log-sum-exp; every row is written, and none beside."""
    poison = torch.full(lane._lse_shape, math.nan, device=tokens[0].device)
    del poison  # what is allocated next likely lies there
    out, lse = lane(*tokens)
    assert out.isfinite().all(), "rows are not written, or not finite"
    assert lse.isfinite().all(), "the log-sum-exp of rows is not written, or not finite"
    guards = lane.room[:GUARD], lane.room[GUARD + out.numel() :]
    assert all(guard.isnan().all() for guard in guards), "rows beside the output are written"
    return out, lse


def assert_exact(one, tokens, out, lse=None):
    """Within twice the error of torch's dense kernel of the same dtype, by the greatest and by the norm."""
    exact, exact_lse, plain = map(torch.cat, zip(*map_heads(one, *tokens), strict=True))
    out = out.flatten(0, 1)
    # no kernel need be better than one that rounds the output alone
    floor = torch.finfo(out.dtype).eps / 2
    for name, size in (("greatest error", lambda x: x.abs().max()), ("norm of the error", torch.linalg.norm)):
        error, theirs, whole = (size(x).item() for x in (out - exact, plain - exact, exact))
        assert theirs <= 32 * floor * whole, f"torch's kernel is no measure: {name} {theirs:.3g}"
        budget = max(BUDGET * theirs, floor * whole)
        assert error <= budget, f"{name} {error:.3g} exceeds {budget:.3g}, of torch's kernel {theirs:.3g}"
    if lse is not None:
        off = (lse.flatten(0, 1) - exact_lse).abs().max().item()
        budget = LSE_ERROR * max(1.0, exact_lse.abs().max().item() / 10)
        assert off <= budget, f"the log-sum-exp is off by {off:.3g}, more than {budget:.3g}"


def map_heads(one, q, k, v):
    """Exact output and log-sum-exp, and torch's output, of one head at a time, to bound the memory."""
    share = one.heads // one.kv_heads
    pairs = every_pair(one, q.device)
    for b, h in itertools.product(range(one.batch), range(one.heads)):
        x, y, z = q[b, None, h, None], *(kv[b, None, h // share, None] for kv in (k, v))
        exact, lse = exactly(x, y, z, pairs[b, None], one.scale)
        yield exact[0], lse[0], dense(x, y, z, pairs[b, None], one.scale)[0]


def every_pair(one, device):
    """[batch, 1, queries, keys]."""
    rows = torch.arange(one.problem.spec.num_tokens + one.problem.prefix + one.problem.suffix, device=device)
    return torch.stack([allowed(case_of(one), b, rows) for b in range(one.batch)])[:, None]


def case_of(one):
    """As gnaflex.trial has it: a length for every run, those that are empty too, within its bounds."""
    lengths = []
    for row in [] if one.valid is None else torch.tensor(one.valid).expand(one.batch, -1).tolist():
        rest = iter(row)
        lengths.append(tuple(min(max(next(rest), 0), n) if n else 0 for n in one.problem.texts))
    return Case("", one.problem.spec, one.problem.texts, one.batch, valid=tuple(lengths) or None)


def dense(q, k, v, pairs, scale):
    """torch's kernel, which takes scales above zero."""
    sign = 1 if scale is None else (scale > 0) - (scale < 0)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return scaled_dot_product_attention(
            q * sign, k, v, attn_mask=pairs, scale=None if scale is None else abs(scale) or 1.0
        )


# ---- every kernel ------------------------------------------------------------------------------------


def tries(config):
    """By name, for the boxes of a kernel: its stride groups are query boxes, so that it needs no masks."""
    q, kv = config.q_box, config.kv_box
    text = (37, 130, 5) if config.text else (0, 0, 0)
    window = tuple(max(a, b + 1) for a, b in zip(q, kv, strict=True))
    shape = tuple(w + a + 1 for w, a in zip(window, q, strict=True))
    odd = Problem(GNA(shape, window, q), *text)  # cut tiles, and windows that start anywhere
    whole = tuple(-(-a // b) * b for a, b in zip(q, kv, strict=True))
    even = tuple(w + a for w, a in zip(whole, q, strict=True))
    groups = Problem(GNA((2 * even[0] + 1, *even[1:]), whole, q, (2, *(1 for _ in q[1:]))), *text)
    found = {
        "odd": Try(odd),
        "heads last": Try(odd, 2, 4, 4, "heads last"),
        "packed": Try(odd, 2, 2, 2, "packed"),
        "padded": Try(odd, 2, 2, 2, "padded"),
        "GQA": Try(odd, 2, 4, 2, "heads last"),
        "MQA": Try(odd, 1, 4, 1),
        "expanded": Try(odd, 2, 4, 2, "expanded"),
        "whole tiles": Try(Problem(GNA(even, whole, q), *text)),
        "uneven dilation groups": Try(groups, 1, 4, 2),
        "negative scale": Try(groups, scale=-0.3),
        "no scale": Try(odd, scale=0.0),
        "tiny scale": Try(odd, scale=1e-4),
        "large scale": Try(odd, scale=2.0),
        "scores of 1e3": Try(odd, size=16.0),
    }
    if config.text:
        spec, lengths = odd.spec, ((5, 129, 0), (0, 64, 5))
        found |= {
            "valid text": Try(odd, 2, 4, 2, valid=lengths),
            "one length for all": Try(odd, 2, valid=((40, -3, 2),)),
            "no text is valid": Try(odd, valid=((0, 0, 0),)),
            "text before": Try(Problem(spec, 200), valid=((129,),)),
            "text behind": Try(Problem(spec, 0, 1), 2, valid=((0,), (1,))),
            "keys alone": Try(Problem(spec, 0, 0, 300), 2, layout="heads last"),
        }
    return found


EVERY = [
    pytest.param(config, name, id=f"{config.name} {name}") for config in CONFIGS for name in tries(config)
]


@pytest.mark.parametrize("config, name", EVERY)
def test_values(config, name):
    check(config, kernel(config), tries(config)[name], DEVICE)


def random_axis(rng, room, q):
    """Length, window, stride, dilation, causal of an axis where boxes of ``q`` queries need no mask."""
    while True:
        dilation = rng.choice((1, 1, 1, 2, 3))
        tokens = rng.randint(1, max(room // dilation, 1))
        window = rng.choice((tokens, rng.randint(1, tokens)))
        stride = min(rng.choice((q, 2 * q, 3 * q, rng.randint(1, window))), window)
        length = tokens * dilation + rng.randrange(dilation)
        axis = (length, window, stride, dilation, rng.random() < 0.3)
        if Plan(GNA(*axis), (q,), (1,), "dynamic").is_block_sparse:
            return axis


def random_try(rng, config, most=1500):
    """Anything that a call may be, of some tokens."""
    room, axes = rng.randint(1, most), {}
    for left, a in zip(range(config.rank, 0, -1), rng.sample(range(config.rank), config.rank), strict=True):
        axes[a] = random_axis(rng, min(room, round(2 * room ** (1 / left))), config.q_box[a])
        room = max(room // axes[a][0], 1)
    spec = GNA(*zip(*(axes[a] for a in range(config.rank)), strict=True))
    texts, valid, batch = (0, 0, 0), None, rng.choice((1, 1, 2, 3))
    while config.text and not any(texts):
        texts = tuple(rng.choice((0, rng.randint(1, 40), 128, rng.randint(129, 300))) for _ in range(3))
    if any(texts) and rng.random() < 0.7:
        valid = [
            [rng.choice((0, n, n + 7, -3, rng.randint(0, n))) for n in texts if n]
            for _ in range(rng.choice((1, batch)))
        ]
    kv_heads = rng.randint(1, 2)
    scale, size = rng.choice((None, None, 0.3, -0.2, 0.0, 1.0)), rng.choice((1.0, 1.0, 0.1, 8.0))
    heads, layout = kv_heads * rng.choice((1, 2, 3)), rng.choice([*LAYOUTS])
    return Try(Problem(spec, *texts), batch, heads, kv_heads, layout, valid, scale, size)


def check_random(config, launcher, device, count, seconds, most=1500):
    """As many random problems as time allows; how many there were."""
    rng, end = random.Random(config.name), time.monotonic() + seconds
    for done in range(count):
        if time.monotonic() > end:
            return done
        one = random_try(rng, config, most)
        try:
            check(config, launcher, one, device, seed=done)
        except AssertionError as error:
            raise AssertionError(f"number {done}, {one}: {error}") from error
    return count


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.name)
def test_random_problems(config, capsys):
    each = -(-RANDOM // len(CONFIGS))
    done = check_random(config, kernel(config), DEVICE, each, RANDOM_S / len(CONFIGS))
    with capsys.disabled():
        print(f" {done} of {each} random problems", end=" ")
    assert done


# ---- through the door --------------------------------------------------------------------------------


def door_mask(problem, device, **options):
    texts = dict(zip(("prefix", "suffix", "extra_kv"), problem.texts, strict=True))
    return gnaflex.block_mask(problem.spec, device=device, **texts, **options)


def check_door(dtype, head_dim, problem, device, launched):
    """flex_attention, and attention where there are no queries of text, by the kernel."""
    one = Try(problem, 2, 4, 2, "heads last")
    q, k, v = tensors(one, dtype, head_dim, device)
    bm, before = door_mask(problem, device), launched()
    for _ in range(2):  # the second time by a lane
        out, lse = gnaflex.flex_attention(
            q, k, v, block_mask=bm, enable_gqa=True, return_lse=True, backend="cuda"
        )
        assert_exact(one, (q, k, v), out, lse)
    assert launched() == before + 2
    if not any(problem.texts):
        grids = [x.transpose(1, 2).unflatten(1, problem.spec.shape) for x in (q, k, v)]
        same = gnaflex.attention(*grids, problem.spec.window, problem.spec.stride, backend="cuda")
        assert torch.equal(same.flatten(1, -3).transpose(1, 2), out)
        assert launched() == before + 3


@pytest.mark.parametrize("dtype, head_dim, problem", DOOR, ids=str)
def test_the_door(dtype, head_dim, problem, launched):
    check_door(dtype, head_dim, problem, DEVICE, launched)


def check_auto(device, launched, spec=SMALL):
    """What nobody asked for by name goes to a kernel, and what needs gradients does not."""
    one, before = Try(Problem(spec)), launched()
    q, k, v = tensors(one, torch.bfloat16, 128, device)
    bm = door_mask(one.problem, device)
    assert gnaflex.explain(q, k, v, bm).backend == "cuda"
    gnaflex.flex_attention(q, k, v, block_mask=bm)
    assert launched() == before + 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert gnaflex.explain(*leaves, bm).backend != "cuda"
    out = gnaflex.flex_attention(*leaves, block_mask=bm)
    found = torch.autograd.grad(out.double().square().sum(), leaves)
    assert launched() == before + 1
    pairs = every_pair(one, device)
    theirs = dense(*leaves, pairs, None)
    theirs = torch.autograd.grad(theirs.double().square().sum(), leaves)
    exact = torch.autograd.grad(exactly(*leaves, pairs, None)[0].square().sum(), leaves)
    for ours, plain, true in zip(found, theirs, exact, strict=True):
        error, budget = ((x.double() - true.double()).norm() / true.double().norm() for x in (ours, plain))
        assert error <= max(BUDGET * budget, torch.finfo(torch.bfloat16).eps)


def test_auto_takes_kernels_but_for_gradients(launched):
    check_auto(DEVICE, launched)


def check_compiled(device, launched, spec=SMALL, *, changes, **options):
    """The kernel inside functions that torch.compile takes as a whole, by the same bits as alone. Yields the
    launches of every call."""
    one = Try(Problem(spec), 1, 2, 2, "heads last")
    text = one._replace(problem=Problem(spec, suffix=40))
    bm = door_mask(text.problem, device)

    def flex(q, k, v):
        return gnaflex.flex_attention(q * 2, k, v, block_mask=bm) + 1

    def grid(q, k, v):
        q, k, v = (x.transpose(1, 2).unflatten(1, spec.shape) for x in (q, k, v))
        return gnaflex.attention(q * 2, k, v, spec.window, spec.stride) + 1

    for function, what in ((flex, text), (grid, one)):
        compiled, counts = torch.compile(function, fullgraph=True, **options), []
        for seed in range(changes):
            tokens = tensors(what, torch.bfloat16, 128, device, seed)
            expected, before = function(*tokens), launched()
            assert torch.equal(compiled(*tokens).clone(), expected), f"{function.__name__}, call {seed}"
            counts.append(launched() - before)
        yield function.__name__, counts


def test_compiled_functions(launched):
    for name, counts in check_compiled(DEVICE, launched, changes=3):
        assert counts == [1, 1, 1], name


def test_compiled_functions_in_cuda_graphs(launched):
    for name, counts in check_compiled(DEVICE, launched, changes=6, mode="reduce-overhead"):
        assert counts[0] >= 1, name
        assert counts[-2:] == [0, 0], f"{name}: launched {counts}, so not from a graph"


def test_a_kernel_proves_itself_in_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv(proof.SWITCH, raising=False)
    monkeypatch.setenv("GNAFLEX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setattr(gate, "_launchers", {})
    one = Try(Problem(SMALL))
    tokens = tensors(one, torch.bfloat16, 128, DEVICE)
    config = one.problem.config(gpu_items.ARCH, torch.bfloat16, 128)
    gnaflex.flex_attention(*tokens, block_mask=door_mask(one.problem, DEVICE))
    found = proof.recorded(gate.subject_of(config, DEVICE))
    assert found is not None
    assert found.outcome == "proved", found.reason
    assert gate._launchers


# ---- graphs, streams, size ---------------------------------------------------------------------------


@pytest.mark.usefixtures("launched")
def test_a_graph_is_replayed_on_other_inputs():
    problem = Problem(SMALL, suffix=40)
    lengths = torch.tensor([[40]], dtype=torch.int32, device=DEVICE)
    bm = door_mask(problem, DEVICE, text_valid=lengths)
    tokens = tensors(Try(problem), torch.bfloat16, 128, DEVICE)

    def call():
        return gnaflex.flex_attention(*tokens, block_mask=bm, return_lse=True, backend="cuda")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for seed, length in ((1, 40), (2, 7), (3, 0)):
        others = tensors(Try(problem), torch.bfloat16, 128, DEVICE, seed)
        for mine, other in zip(tokens, others, strict=True):
            mine.copy_(other)
        lengths.fill_(length)
        for x in got:
            x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, call()))
        assert_exact(Try(problem, valid=((length,),)), tokens, *got)


@pytest.mark.usefixtures("launched")
def test_a_call_waits_for_the_work_of_its_stream():
    one = Try(Problem(SMALL))
    bm = door_mask(one.problem, DEVICE)
    tokens, others = (tensors(one, torch.bfloat16, 128, DEVICE, seed) for seed in (0, 1))
    gnaflex.flex_attention(*tokens, block_mask=bm, backend="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, 50 ms: a launch on another stream would be done long before
        for mine, other in zip(tokens, others, strict=True):
            mine.copy_(other)
        out = gnaflex.flex_attention(*tokens, block_mask=bm, backend="cuda")
    stream.synchronize()
    assert_exact(one, others, out)


@pytest.mark.usefixtures("launched")
def test_a_video():
    problem = gpu_items.walked(gpu_items.VIDEO)
    tokens = tensors(Try(problem, layout="heads last"), torch.bfloat16, 128, DEVICE)
    bm = door_mask(problem, DEVICE)
    options = {"block_mask": bm, "return_lse": True}
    out, lse = gnaflex.flex_attention(*tokens, **options, backend="cuda")
    theirs, their_lse = gnaflex.flex_attention(*tokens, **options, backend="flex")
    assert out.isfinite().all()
    assert (lse - their_lse).abs().max().item() <= LSE_ERROR
    difference, whole = (x.float().norm() for x in (out - theirs, theirs))
    assert difference <= 2 * torch.finfo(torch.bfloat16).eps * whole
    greatest = theirs.abs().max().item()
    assert (out - theirs).abs().max().item() <= 2 * torch.finfo(torch.bfloat16).eps * greatest
