"""Kernels behind the public door, on machines that look like a GPU: values, layouts, launches, the trial.

The stand-in computes in float64 from the numbers of a launch alone, and rounds once, as the reference does.
"""

from __future__ import annotations

import math
import random
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from cases import random_spec
from gnaflex.cuda_backend import machine
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.tile_walk import Q_ROWS, chosen, pair_counts
from hopper import blackwell, hopper  # noqa: F401
from stand_in import DTYPES, StandIn, at
from torch.nn.attention.flex_attention import AuxRequest

import gnaflex
from gnaflex import door
from gnaflex.spec import GNA
from gnaflex.trial import trial

CPU = torch.device("cpu")
BLOCKED = GNA((16, 16), 8, 8)
ARE_QUERIES, ROUNDS = 6, 7  # in texts, as abi.py has it
SCALES = (None, 0.3, -0.2, 0)


mask = partial(gnaflex.block_mask, device=CPU)
on_hopper = pytest.mark.usefixtures("hopper")


@pytest.fixture(params=["hopper", "blackwell"])
def opened(request):
    """The kernels that were opened on either machine."""
    return request.getfixturevalue(request.param)


def calls_of(opened):
    return [call for kernel in opened.values() for call in kernel.calls]


def assert_one_rounding(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(ours.dtype).eps, atol=1e-7)


def assert_as_reference(q, k, v, bm, **options):
    """The kernel's output and log-sum-exp, compared with the reference's."""
    options = {"block_mask": bm, "enable_gqa": True, "return_lse": True, **options}
    with torch.no_grad():
        got = gnaflex.flex_attention(q, k, v, **options, backend="cuda")
        assert_one_rounding(got, gnaflex.flex_attention(q, k, v, **options, backend="reference"))
    return got[0]


def tensors(bm, batch=1, heads=2, kv_heads=2, dim=64, dtype=torch.bfloat16, layout="contiguous", seed=0):
    """Query, key and value for a mask."""
    queries, keys = bm.seq_lengths
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [LAYOUTS[layout](randn, batch, h, n, dim) for h, n in sizes]


LAYOUTS = {
    "contiguous": lambda randn, b, h, n, d: randn(b, h, n, d),
    "heads_last": lambda randn, b, h, n, d: randn(b, n, h, d).transpose(1, 2),
    "packed": lambda randn, b, h, n, d: randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
    "padded": lambda randn, b, h, n, d: randn(b + 1, h, n + 3, d + 8)[1:, :, 2:-1, :d],
    "repeated": lambda randn, b, h, n, d: randn(1, 1, n, d).expand(b, h, -1, -1),
}


# ---- values ------------------------------------------------------------------------------------------


def block_sparse(rng):
    """A random problem that a kernel can run."""
    while True:
        spec = random_spec(rng, rng.randint(1, 3), rng.choice((40, 200, 600)))
        if chosen(spec) is not None:
            return spec


def lengths_of(rng, texts, batch):
    """How many tokens of every run are real, some of them past its end or below zero."""
    rows, dtype = rng.choice((1, batch)), rng.choice((torch.int32, torch.int64))
    each = [[rng.choice((rng.randint(0, n), n + 3, -1)) for n in texts if n] for _ in range(rows)]
    return torch.tensor(each, dtype=dtype)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("seed", range(50))
def test_random_calls(seed):
    rng = random.Random(seed)
    spec, batch = block_sparse(rng), rng.randint(1, 3)
    texts = [rng.choice((0, 1, rng.randint(1, 40), 140)) for _ in range(3)] if rng.random() < 0.6 else [0] * 3
    valid = lengths_of(rng, texts, batch) if any(texts) and rng.random() < 0.7 else None
    extras = dict(zip(("prefix", "suffix", "extra_kv"), texts, strict=True))
    bm = mask(spec, text_valid=valid, **extras)
    kv_heads, dtype = rng.choice((1, 2)), rng.choice((torch.bfloat16, torch.float16))
    heads, dim = kv_heads * rng.choice((1, 2, 3)), rng.choice((64, 128))
    q, k, v = tensors(bm, batch, heads, kv_heads, dim, dtype, rng.choice([*LAYOUTS]), seed)
    scale = rng.choice(SCALES)
    assert_as_reference(q, k, v, bm, scale=scale)
    if valid is not None:
        valid.copy_(lengths_of(rng, texts, batch)[: len(valid)])
        assert_as_reference(q, k, v, bm, scale=scale)
        for one in (gnaflex.with_lengths(bm, text_valid=lengths_of(rng, texts, batch)), bm):
            assert_as_reference(q, k, v, one, scale=scale)


@pytest.mark.parametrize(
    "spec, launches",
    [
        (GNA((21, 12), (4, 4), (4, 4), (2, 1)), 2),
        (GNA((19, 22), (6, 7), (4, 2), (3, 3)), 4),
        (GNA((20, 9), (4, 3), (4, 2), (4, 1)), 1),
        (GNA((13, 9, 11), (3, 4, 5), (2, 4, 5), (4, 2, 2)), 8),
        (GNA((9, 24), (4, 8), (1, 8), is_causal=(True, False)), 1),
        (GNA((7, 9, 16), (3, 4, 8), (1, 2, 8), (2, 1, 1), is_causal=(True, True, False)), 2),
    ],
    ids=str,
)
def test_a_launch_for_every_combination_of_group_lengths(opened, spec, launches):
    bm = mask(spec, prefix=5, suffix=130)
    assert_as_reference(*tensors(bm, heads=4), bm)
    calls = calls_of(opened)
    assert len(calls) == launches
    assert sum(call["texts"][ARE_QUERIES] for call in calls) == 1
    assert all(one == 1 for one, causal in zip(chosen(spec).q_tile, spec.is_causal, strict=True) if causal)


@on_hopper
def test_what_comes_back():
    given = tensors(bm := mask(BLOCKED))
    for _ in range(2):  # the second time by a lane
        out, lse = gnaflex.flex_attention(*given, block_mask=bm, return_lse=True)
        assert torch.equal(gnaflex.flex_attention(*given, block_mask=bm), out)
        assert lse.dtype == torch.float32
        other, aux = gnaflex.flex_attention(*given, block_mask=bm, return_aux=AuxRequest(lse=True))
        assert torch.equal(other, out)
        assert torch.equal(aux.lse, lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_read_where_they_lie(hopper, layout):  # noqa: F811
    q, k, v = tensors(bm := mask(BLOCKED), 2, 4, 2, layout=layout)
    out, (call,) = assert_as_reference(q, k, v, bm), calls_of(hopper)
    assert [call[name] for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]
    assert q.is_contiguous() == (layout == "contiguous")
    if layout != "repeated":
        assert sorted(range(4), key=out.stride, reverse=True) == sorted(range(4), key=q.stride, reverse=True)
    assert out.shape == q.shape


@on_hopper
def test_queries_in_another_layout_than_keys_and_values():
    bm = mask(BLOCKED, suffix=9, extra_kv=30)
    for one, other, third in (("packed", "padded", "heads_last"), ("padded", "repeated", "packed")):
        q, k, v = (tensors(bm, 2, layout=name)[i] for i, name in enumerate((one, other, third)))
        assert_as_reference(q, k, v, bm)
        assert_as_reference(q, k, v, bm, scale=-1.5)


@on_hopper
def test_a_dimension_of_one_may_have_any_stride():
    given = tensors(bm := mask(BLOCKED), 1, 1, 1)
    assert_as_reference(*(x.as_strided(x.shape, (7, 3, 64, 1)) for x in given), bm)


IN_TILES = {"window": (16, 16), "stride": (16, 16)}  # FlexAttention has fewer blocks tile-major


def grids(shape=(16, 64), batch=2, heads=4, kv_heads=2, extra=0):
    generator = torch.Generator().manual_seed(1)
    sizes = [(batch, *shape, h, 64) for h in (heads, kv_heads, kv_heads)] + [(batch, extra, kv_heads, 64)] * 2
    return [torch.randn(*size, generator=generator).bfloat16() for size in sizes]


def test_grids_are_read_where_they_lie(hopper):  # noqa: F811
    q, k, v, *_ = grids()
    assert door._problem(0, q.shape[1:3], *IN_TILES.values(), 1, False).cheapest.order.is_tiled
    expected = gnaflex.attention(q, k, v, **IN_TILES, backend="reference", return_lse=True)
    for _ in range(2):  # the second time by a lane
        got = gnaflex.attention(q, k, v, **IN_TILES, return_lse=True)
        assert_one_rounding(got, expected)
        call = calls_of(hopper)[-1]
        assert [call[name] for name in "qkvo"] == [x.data_ptr() for x in (q, k, v, got[0])]
        assert got[0].is_contiguous()
    assert len(calls_of(hopper)) == 2
    for window, stride in ((16, (8, 16)), (8, 8), (16, (1, 16))):
        assert_one_rounding(
            [gnaflex.attention(q, k, v, window, stride, backend="cuda")],
            [gnaflex.attention(q, k, v, window, stride, backend="reference")],
        )


def test_extra_keys(hopper):  # noqa: F811
    q, k, v, extra_k, extra_v = grids(extra=7)
    gnaflex.attention(q, k, v, **IN_TILES)  # a lane waits
    extra = {"extra_keys": extra_k, "extra_values": extra_v, "return_lse": True}
    for _ in range(2):
        got = gnaflex.attention(q, k, v, **IN_TILES, **extra)
        expected = gnaflex.attention(q, k, v, **IN_TILES, **extra, backend="reference")
        assert_one_rounding(got, expected)
        extra_v.copy_(extra_k)
        v.neg_()
    assert {call["q"] for call in calls_of(hopper)} == {q.data_ptr()}


@pytest.mark.parametrize("which", range(3))
def test_gradients_never_go_to_a_kernel(hopper, which):  # noqa: F811
    given = grids((8, 16), 1, 2, 2)[:3]
    gnaflex.attention(*given, window=8, stride=8)
    assert len(calls_of(hopper)) == 1  # a lane waits
    given[which].requires_grad_()
    gnaflex.attention(*given, window=8, stride=8).sum().backward()
    assert given[which].grad.abs().sum() > 0
    assert len(calls_of(hopper)) == 1
    with torch.no_grad():
        gnaflex.attention(*given, window=8, stride=8)
    assert len(calls_of(hopper)) == 2


def items_of(call, halves=1):
    """The work of a launch: boxes of every group, head and batch entry, and lines of text queries, so many at
    once."""
    (batch, heads, *_, boxes, _), texts = call["sizes"], call["texts"]
    lines = texts[ARE_QUERIES] * sum(-(-n // Q_ROWS) for n in texts[:2])
    return batch * heads * (boxes // halves * math.prod(call["groups"]) + -(-lines // halves))


@pytest.mark.parametrize("multiprocessors", [1, 5, 1000])
def test_blocks(opened, monkeypatch, multiprocessors):
    monkeypatch.setattr(machine, "multiprocessors", lambda device: multiprocessors)
    bm = mask(GNA((21, 12), (4, 4), (4, 4), (4, 1)), prefix=129, extra_kv=300)
    assert_as_reference(*tensors(bm, 2, 4), bm)
    calls, ((config, _),) = calls_of(opened), opened
    items = [items_of(call, BOXES_AT_ONCE[config.arch]) for call in calls]
    assert [call["blocks"] for call in calls] == [min(n, multiprocessors) for n in items]
    assert len(set(items)) == len(calls) == 2


def test_blackwell_takes_boxes_in_pairs(hopper, blackwell):  # noqa: F811
    spec = GNA((24, 32), (12, 8), (2, 8))
    assert_as_reference(*tensors(bm := mask(spec, suffix=300), 2, 2), bm)
    assert not hopper
    (call,), ((config, _),) = calls_of(blackwell), blackwell
    boxes = chosen(spec, 2)
    assert (config.arch, config.q_box, config.kv_box) == ("sm_100a", boxes.q_tile, boxes.kv_tile)
    assert call["sizes"][5] > boxes.query_tiles
    both, alone = pair_counts(boxes)
    pairs, text = call["sizes"][5] // 2, math.ceil(300 / 48)
    assert call["texts"][ROUNDS] == round((768 / 48 + text) / ((both + alone) / pairs + text)) == 2


def test_an_empty_batch(hopper):  # noqa: F811
    bm = mask(BLOCKED, suffix=9, text_valid=[4])
    out, lse = gnaflex.flex_attention(*tensors(bm, 0), block_mask=bm, backend="cuda", return_lse=True)
    assert (out.shape, lse.shape) == ((0, 2, 265, 64), (0, 2, 265))
    assert not calls_of(hopper)


def test_an_error_code_is_raised(hopper):  # noqa: F811
    given = tensors(bm := mask(BLOCKED))
    assert gnaflex.explain(*given, bm).backend == "cuda"
    for opened in hopper:
        hopper[opened] = lambda *numbers: 719
    with pytest.raises(RuntimeError, match=r"CUDA error 719 on cpu"):
        gnaflex.flex_attention(*given, block_mask=bm)


# ---- the trial ---------------------------------------------------------------------------------------


class Wrong(StandIn):
    """A kernel with a mistake, which says what numbers to run with, or with ``after`` spoils the results."""

    def __init__(self, config, mistake, after):
        super().__init__(config)
        self.mistake, self.after, self.kept = mistake, after, []

    def launch(self, **numbers):
        changed = {} if self.after else self.mistake(self, numbers)
        if changed is not None:
            self.kept.append(changed)
            changed = {name: x.data_ptr() if torch.is_tensor(x) else x for name, x in changed.items()}
            super().launch(**{**numbers, **changed})
        if self.after:
            self.mistake(self, numbers)

    def tensor(self, numbers, name):
        batch, heads, kv_heads, queries, keys, _, _ = numbers["sizes"]
        if name == "lse":
            size = batch, heads, queries
            return at(numbers["lse"], torch.float32, size, (heads * queries, queries, 1))
        first, size = 3 * "qkvo".index(name), (kv_heads, keys) if name in "kv" else (heads, queries)
        strides = *numbers["strides"][first : first + 3], 1
        return at(numbers[name], DTYPES[self.config.dtype], (batch, *size, self.config.head_dim), strides)


def fewer_keys(rest):
    """On the last axis, by what ``rest`` says of the number of keys and the extent of a tile."""

    def mistake(kernel, numbers):
        size, rank = (numbers["sizes"][5], 3, kernel.config.rank), kernel.config.rank
        work = at(numbers["work"], torch.int32, size, (3 * rank, rank, 1)).clone()
        work[:, 2, -1].apply_(lambda keys: keys - rest(keys, kernel.config.kv_box[-1]))
        return {"work": work}

    return mistake


def of_second(keys=None, later=True):
    """Second halves with so many keys, or with the first key of the first half."""

    def mistake(kernel, numbers):
        rank, boxes = kernel.config.rank, numbers["sizes"][5]
        work = at(numbers["work"], torch.int32, (boxes, 3, rank), (3 * rank, rank, 1)).clone()
        if keys is not None:
            work[1::2, 2] = keys
        if not later:
            work[1::2, 1] = work[::2, 1]
        return {"work": work}

    return mistake


def all_present(kernel, numbers):
    """A half that is none as if it had text to see, or else a key."""
    rank, boxes = kernel.config.rank, numbers["sizes"][5]
    work = at(numbers["work"], torch.int32, (boxes, 3, rank), (3 * rank, rank, 1)).clone()
    work[1::2, 2] = work[1::2, 2].clamp(min=1)
    return {"work": work}


def without_last_text(kernel, numbers):
    """As if text queries without a partner were none."""
    texts = numbers["texts"][:2]
    if sum(-(-n // Q_ROWS) for n in texts) % 2 and numbers["texts"][ARE_QUERIES]:
        out = kernel.tensor(numbers, "o")
        first = out.shape[2] - (texts[1] - 1) % Q_ROWS - 1
        out[:, :, first:] = math.nan


def swap(name):
    """Two rows of the first head."""

    def mistake(kernel, numbers):
        x = kernel.tensor(numbers, name)
        x = x if name == "o" else x.clone()
        x[0, 0, :2] = x[0, 0, :2].flip(0)
        return {name: x}

    return mistake


def other_valid(kernel, numbers):
    everything = torch.tensor([n for n in numbers["texts"][:3] if n], dtype=torch.int32)
    return {"valid": everything, "sizes": (*numbers["sizes"][:6], 0)}


def usual(kernel):
    return kernel.config.head_dim**-0.5 * math.log2(math.e)


def unturned(kernel, numbers):
    """As if the host had not turned the sign of the query for a negative scale."""
    is_usual = math.isclose(numbers["scale_log2"], usual(kernel))
    return {} if is_usual else {"q": -kernel.tensor(numbers, "q")}


def by_strides_of(name, other):
    to, of = (3 * "qkvo".index(one) for one in (name, other))
    return lambda _, n: {"strides": (*n["strides"][:to], *n["strides"][of : of + 3], *n["strides"][to + 3 :])}


def output_by_rows(kernel, n):
    _, heads, _, queries, *_ = n["sizes"]
    dim = kernel.config.head_dim
    return {"strides": (*n["strides"][:9], heads * queries * dim, queries * dim, dim)}


def without_strides(*places):
    return lambda _, n: {"strides": [0 if i in places else x for i, x in enumerate(n["strides"])]}


def one_item(kernel, numbers):
    if items_of(numbers) > numbers["blocks"]:
        kernel.tensor(numbers, "o").fill_(math.nan)


# fmt: off
MISTAKES = {  # and the case that notices
    "drops the last tile": (fewer_keys(lambda n, box: (n > box) * ((n - 1) % box + 1)), "clipped"),
    "drops a key": (fewer_keys(lambda n, box: 1), "clipped"),
    "ignores valid": (other_valid, "valid text"),
    "one row of valid": (lambda _, n: {"sizes": (*n["sizes"][:6], 0)}, "valid text"),
    "one key head": (without_strides(4, 7), "clipped"),
    "one batch entry of keys": (without_strides(3, 6), "clipped"),
    "keys by the strides of queries": (by_strides_of("k", "q"), "clipped"),
    "starts one later": (lambda _, n: {"start": n["start"] + (n["start"] > 0)}, "clipped"),
    "swaps two values": (swap("v"), "clipped"),
    "the query as it was": (unturned, "many tiles"),
    "one scale": (lambda kernel, _: {"scale_log2": usual(kernel)}, "many tiles"),
    "no text queries": (lambda _, n: {"texts": (*n["texts"][:6], 0, *n["texts"][7:])}, "clipped"),
    "one column": (lambda _, n: {"texts": (*n["texts"][:3], 0, 0, 0, *n["texts"][6:])}, "clipped"),
    "never writes": (lambda *_: None, "clipped"),
    "drops a tile that is cut": (fewer_keys(lambda n, box: (n > box) * (n % box)), "clipped"),
    "no group steps": (lambda kernel, _: {"group_steps": (0,) * kernel.config.rank}, "dilation"),
    "one group": (lambda kernel, _: {"groups": (1,) * kernel.config.rank}, "dilation"),
    "dilates one axis": (lambda _, n: {"steps": (n["steps"][0], *n["group_steps"][1:])}, "dilation of"),
    "values by the strides of keys": (by_strides_of("v", "k"), "whole tiles, strides"),
    "output by rows": (output_by_rows, "whole tiles, strides"),
}
AFTER = {
    "lse in base 2": (lambda k, n: k.tensor(n, "lse").mul_(math.log2(math.e)), "clipped tiles: the log-sum"),
    "writes NaN": (lambda k, n: k.tensor(n, "o")[0, 0, -1].fill_(math.nan), "clipped tiles: error inf"),
    "swaps two rows": (swap("o"), "clipped"),
    "a block does one item": (one_item, "clipped tiles, many a block"),
}
IN_PAIRS = {
    "drops second halves": (of_second(keys=0), "clipped"),
    "starts where the first half does": (of_second(later=False), "shifted"),
    "takes a half that is none": (all_present, "clipped"),
    "drops the last text queries": (without_last_text, "clipped"),
}
RIGHT = [
    KernelConfig("sm_90a", *fields)
    for fields in (
        ("float16", 64, (4, 8), (4, 4), True),
        ("bfloat16", 64, (8, 16), (8, 16), True),
        ("bfloat16", 128, (4, 8), (4, 4), False),
        ("float16", 128, (128,), (128,), True),
        ("float16", 64, (8,), (48,), False),
        ("bfloat16", 64, (2, 4, 4), (2, 2, 4), False),
        ("float16", 64, (1, 2, 8), (2, 2, 4), True),
    )
]
PAIRED = [
    KernelConfig("sm_100a", *fields)
    for fields in (
        ("float16", 64, (8,), (48,), True),
        ("bfloat16", 64, (2, 4, 4), (2, 2, 4), False),
        ("float16", 64, (1, 2, 8), (2, 2, 4), True),
        ("bfloat16", 128, (4, 8), (4, 4), False),
    )
]
# fmt: on


@on_hopper
@pytest.mark.parametrize("kernel", RIGHT + PAIRED, ids=lambda one: one.name)
def test_a_right_kernel_is_proved(kernel):
    assert trial(kernel, CPU, StandIn(kernel)) == ("proved", "")


@on_hopper
@pytest.mark.parametrize(
    "kernel, name",
    [*((RIGHT[0], name) for name in [*MISTAKES, *AFTER]), *((PAIRED[0], name) for name in IN_PAIRS)],
    ids=lambda one: one if isinstance(one, str) else one.arch,
)
def test_a_wrong_kernel_is_not(kernel, name):
    mistake, case = {**MISTAKES, **AFTER, **IN_PAIRS}[name]
    after = name in AFTER or mistake is without_last_text
    outcome, reason = trial(kernel, CPU, Wrong(kernel, mistake, after))
    assert outcome == "failed"
    assert reason.startswith(case)


@on_hopper
def test_no_memory_says_nothing_about_a_kernel():
    crowded = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nMore."))
    assert trial(RIGHT[0], CPU, crowded) == ("inconclusive", "CUDA out of memory.")
