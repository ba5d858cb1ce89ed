"""The problems of the benchmarks: the paper's rows, likenesses, what whole tiles allow; and who runs them."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gnaflex.cuda_backend import fast_path, machine
from joint import joint_mask

import gnaflex
from benchmarks import problems, providers
from benchmarks.comparison import inputs
from benchmarks.problems import FULL, QUICK, SMALL, Problem
from benchmarks.providers import DENSE, PROVIDERS, CannotRun, predicted
from benchmarks.truth import Truth
from gnaflex import advice, compiled, flash
from gnaflex.paper import CONFIGURATIONS
from gnaflex.planner import Plan
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA

TEXTS = {
    "no text": Problem("", GNA((9, 24), (4, 8), (2, 8)), 2, 3),
    "suffix": Problem("", GNA((5, 9, 24), (2, 5, 8), (2, 4, 8)), 1, 1, suffix=150),
    "both": Problem("", GNA((19, 40), (9, 16), (8, 16)), 1, 1, prefix=20, suffix=129),
    "causal": Problem("", GNA((300,), 70, 3, is_causal=True), 1, 1, prefix=128),
}


# ---- which there are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: f"{row.model.name} {row.window} {row.stride}")
def test_every_row_of_the_paper_is_there_once(row):
    spec = GNA(row.model.shape, row.window, row.stride)
    same = [one for one in FULL.values() if one.spec == spec and not (one.prefix or one.suffix)]
    assert [(one.heads, one.head_dim) for one in same] == [(row.model.heads, row.model.head_dim)]


def test_no_problem_is_lost_for_its_name():
    parts = problems._HEADLINES, problems._LTX, problems._MODELS, problems._PREDICT2
    listed = [*itertools.chain(*parts), *problems._rest_of_the_paper()]
    assert len(FULL) == len(listed)
    assert [*FULL] == [one.name for one in FULL.values()]
    assert {id(one) for one in FULL.values()} >= {id(one) for part in parts for one in part}


def test_each_set_is_part_of_the_next():
    assert problems.SETS == {"full": FULL, "small": SMALL, "quick": QUICK}
    assert {*QUICK} < {*SMALL} < {*FULL}
    assert next(iter(FULL)) in QUICK  # the most telling
    for name, one in SMALL.items():
        assert one is FULL[name].small
        assert QUICK.get(name, one) is one
    assert any(one.trains for one in QUICK.values())
    rest = [name for name, one in FULL.items() if not one.trains]  # rows of the paper, which is on inference
    assert len(rest) == len(FULL) - 25
    assert all("stride" in name and not FULL[name].small for name in rest)


@pytest.mark.parametrize("name", SMALL)
def test_a_likeness(name):
    full, small = FULL[name], SMALL[name]
    assert (fast_path.Problem(small.spec).boxes is None) == (fast_path.Problem(full.spec).boxes is None)
    assert small.tokens <= 9000
    assert (small.heads, small.head_dim) == (1, min(full.head_dim, 64))
    assert [math.ceil(n / 4) for n in (full.prefix, full.suffix)] == [small.prefix, small.suffix]
    for field in ("name", "layers"):
        assert getattr(small, field) == getattr(full, field)
    for field in ("rank", "dilation", "is_causal"):
        assert getattr(small.spec, field) == getattr(full.spec, field)
    assert small.small is None


def test_facts():
    assert TEXTS["both"].facts == {
        "shape": [19, 40], "window": [9, 16], "stride": [8, 16], "dilation": [1, 1],
        "prefix": 20, "suffix": 129, "heads": 1, "head_dim": 128, "layers": 1,
    }  # fmt: skip
    facts = TEXTS["causal"].facts
    assert (facts["is_causal"], facts["prefix"], "suffix" in facts) == ([True], 128, False)
    assert {"is_causal", "prefix", "suffix"}.isdisjoint(TEXTS["no text"].facts)


# ---- what tiles allow ----------------------------------------------------------------------------------


def boxes_of_keys(spec: GNA, tiles: Plan) -> int:
    """Visited by all query boxes, from the mask of every pair: those that cut up the keys some query sees."""
    seen, total = dense_mask(spec).numpy(), 0
    for start in itertools.product(*(range(0, n, q) for n, q in zip(spec.shape, tiles.q_tile, strict=True))):
        axes = [range(s, min(s + q, n)) for s, q, n in zip(start, tiles.q_tile, spec.shape, strict=True)]
        queries = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), spec.shape).ravel()
        keys = np.stack(np.unravel_index(np.flatnonzero(seen[queries].any(0)), spec.shape))
        extents = (np.ptp(keys, axis=1) + 1).tolist()
        total += math.prod(math.ceil(n / box) for n, box in zip(extents, tiles.kv_tile, strict=True))
    return total


def counted_pairs(problem: Problem, tiles: Plan, rows: int, columns: int) -> int:
    """Rows times columns of every tile: of the grid's boxes, of text keys for them, of text queries."""
    spec, texts = problem.spec, (problem.prefix, problem.suffix)
    lines = sum(math.ceil(n / columns) for n in texts)
    query_boxes = math.prod(math.ceil(n / q) for n, q in zip(spec.shape, tiles.q_tile, strict=True))
    of_text = sum(math.ceil(n / rows) for n in texts) * (math.ceil(spec.num_tokens / columns) + lines)
    return rows * columns * (boxes_of_keys(spec, tiles) + query_boxes * lines + of_text)


@pytest.mark.parametrize("name", TEXTS)
def test_pairs_are_those_of_the_tiles(name):
    problem = TEXTS[name]
    free = gnaflex.plan(problem.spec, kv_tiling="dynamic")
    assert problem.pairs(free) == counted_pairs(problem, free, 128, 128)
    rank = problem.spec.rank
    q, kv = ((3, 8, 2) if rank > 1 else (96,))[:rank], (2, 4, 8)[:rank]
    given = Plan(problem.spec, q, kv, "dynamic")
    assert problem.pairs(given) == counted_pairs(problem, given, math.prod(q), math.prod(kv))
    dense = (math.ceil((problem.spec.num_tokens + problem.prefix + problem.suffix) / 128) * 128) ** 2
    assert problem.dense_pairs == dense
    assert problem.work_speedup == pytest.approx(dense / problem.pairs(free))


@pytest.mark.parametrize(
    "problem", {**FULL, "small": SMALL["HunyuanVideo"]}.values(), ids=lambda one: one.name
)
def test_the_bound_is_the_planner_s(problem):
    bare = replace(problem, prefix=0, suffix=0)
    assert bare.work_speedup == pytest.approx(gnaflex.plan(problem.spec, kv_tiling="dynamic").work_speedup)
    if problem.prefix or problem.suffix:
        assert problem.work_speedup < bare.work_speedup


# ---- who runs them -----------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LITTLE = Problem("", GNA((6, 20), (5, 8), (1, 4)), 2, 1, 16)
WRITTEN = replace(LITTLE, prefix=5, suffix=9)
TILED = Problem("", GNA((32, 64), (8, 16), (8, 16)), 1, 1, 32)  # for which tile-major order costs least
PLAIN = "dense, flash", 'gnaflex, "sdpa"'
FLEX, TORCH_FLEX = 'gnaflex, "flex"', "FlexAttention, create_block_mask"


def error_of(name, problem, gradients=False, ready=None):
    truth = Truth(problem, inputs(problem, CPU, torch.float32), gradients)
    call = (ready or PROVIDERS[name](problem, CPU)).call
    return truth.error(truth.of_call(call), name in DENSE)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("problem", [LITTLE, WRITTEN, TILED], ids=["bare", "text", "tiled"])
@pytest.mark.parametrize("name", PLAIN)
def test_what_a_cpu_runs_is_right(name, problem, gradients):
    assert error_of(name, problem, gradients) <= 1


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse")
@pytest.mark.parametrize(
    "problem",
    [LITTLE, WRITTEN, replace(LITTLE, suffix=3), replace(WRITTEN, spec=GNA((70,), 9, 2, 3, True))],
    ids=lambda one: str(one.facts),
)
def test_natten_is_right(problem):
    pytest.importorskip("natten", reason="natten is not installed")
    assert error_of("NATTEN", problem) <= 1


@pytest.mark.skipif(compiled.cpu_obstacle() is not None, reason=compiled.cpu_obstacle() or "")
@pytest.mark.parametrize("name", [FLEX, TORCH_FLEX])
def test_what_is_compiled_is_right(name):
    problem = replace(TILED, prefix=5, suffix=130)
    assert advice.cheapest_layout(problem.spec).q_tile == (8, 16)
    ready = PROVIDERS[name](problem, CPU)
    assert error_of(name, problem, ready=ready) <= 1
    made = ready.mask()
    assert made.BLOCK_SIZE == (128, 128)
    order = ((8, 16), (8, 16)) if name == FLEX else (None, None)
    mask = joint_mask([[problem.spec]], *order, 5, 130)[0, 0]
    assert made.shape[-2:] == mask.shape
    listed = (made.kv_num_blocks + made.full_kv_num_blocks).sum().item()
    assert listed == len(blocks_of(mask, 128, 128))
    assert ready.speedup == pytest.approx(problem.dense_pairs / (listed * 128**2))


def blocks_of(mask, rows, columns):
    """Those with a pair that may be seen, by the bool mask over places."""
    return {(i // rows, j // columns) for i, j in zip(*map(np.ndarray.tolist, mask.nonzero()), strict=True)}


@pytest.mark.parametrize(
    "name, why",
    [
        ("dense, cuDNN", "(?i)^no (viable|available)"),
        ("dense, efficient", "(?i)^no (viable|available)"),
        ('gnaflex, "cuda"', "^it needs a Hopper or .* the query is on cpu"),
        ('gnaflex, "flash"', "^it needs an NVIDIA GPU .* the query is on cpu"),
    ],
)
def test_what_needs_a_gpu_says_so(name, why):
    for problem in (LITTLE, WRITTEN):
        with pytest.raises((RuntimeError, CannotRun), match=why):
            error_of(name, problem)


@pytest.mark.parametrize(
    "name, why",
    [
        (FLEX, "^FlexAttention has no backward on cpu"),
        (TORCH_FLEX, "^FlexAttention has no backward on a CPU"),
    ],
)
def test_flexattention_does_not_train_on_a_cpu(name, why):
    for problem in (LITTLE, WRITTEN):
        with pytest.raises(CannotRun, match=why):
            error_of(name, problem, gradients=True)


def test_natten_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(CannotRun, match=r"not installed: pip install .*natten"):
        PROVIDERS["NATTEN"](LITTLE, CPU)


def test_natten_without_its_library(monkeypatch):
    """Its scores are not worth a machine's memory, nor does it train on a CPU."""
    fake = SimpleNamespace(HAS_LIBNATTEN=False, na2d=len)
    monkeypatch.setitem(sys.modules, "natten", fake)
    scores = 120**2 * 2 * 4 * 3
    monkeypatch.setattr(providers, "EAGER_BYTES", scores)
    ready = PROVIDERS["NATTEN"](LITTLE, CPU)
    assert not ready.compiles
    with pytest.raises(CannotRun, match="no backward on a CPU"):
        error_of("NATTEN", LITTLE, gradients=True, ready=ready)
    monkeypatch.setattr(providers, "EAGER_BYTES", scores - 1)
    with pytest.raises(CannotRun, match="uncompiled, with 0 GiB of scores"):
        PROVIDERS["NATTEN"](LITTLE, CPU)
    fake.HAS_LIBNATTEN = True
    assert PROVIDERS["NATTEN"](LITTLE, CPU).compiles


def test_first_calls_of_dense_attention_take_long_on_a_gpu():
    assert [PROVIDERS[name](LITTLE, CPU).compiles for name in DENSE] == [False] * 3
    assert [PROVIDERS[name](LITTLE, CUDA).compiles for name in DENSE] == [True] * 3


@pytest.mark.parametrize("problem", [LITTLE, WRITTEN], ids=["bare", "text"])
def test_masks_of_flash_have_its_blocks(problem):
    ready = PROVIDERS['gnaflex, "flash"'](problem, CPU)
    assert ready.mask().BLOCK_SIZE == (flash.BLACKWELL, 128)
    assert ready.mask() is not ready.mask()


# ---- what the planner says of them ---------------------------------------------------------------------


def ratio(problem, rows, q_tile=None, kv_tile=None):
    """Dense pairs by those of the blocks that are listed, counted in the mask over places."""
    mask = joint_mask([[problem.spec]], q_tile, kv_tile, problem.prefix, problem.suffix)[0, 0]
    return problem.dense_pairs / (len(blocks_of(mask, rows, 128)) * rows * 128)


@pytest.mark.parametrize("text", [{}, {"prefix": 5, "suffix": 130}], ids=["bare", "text"])
def test_predictions_count_pairs(text):
    tiled, little = replace(TILED, **text), replace(LITTLE, **text)
    assert predicted("flex", tiled, CPU) == pytest.approx(ratio(tiled, 128, (8, 16), (8, 16)))
    assert predicted("flex", little, CPU) == pytest.approx(ratio(little, 128))
    assert predicted("flash", little, CPU) == pytest.approx(ratio(little, 256))
    thick = replace(LITTLE, spec=GNA((4, 16, 16), (2, 8, 8), (2, 8, 8)), **text)
    layout = flash.cheapest_layout(thick.spec, 256)
    assert layout.q_tile == (2, 8, 16)
    assert predicted("flash", thick, CPU) == pytest.approx(ratio(thick, 256, layout.q_tile, layout.kv_tile))
    boxes = fast_path.Problem(tiled.spec).boxes
    of_boxes = tiled.dense_pairs / counted_pairs(tiled, boxes, 128, math.prod(boxes.kv_tile))
    assert predicted("cuda", tiled, CPU) == pytest.approx(of_boxes)
    assert predicted("sdpa", tiled, CPU) is None
    assert fast_path.Problem(little.spec).boxes is None
    assert predicted("cuda", little, CPU) is None
    for name in ("cuda", "flash", "flex"):
        assert PROVIDERS[f'gnaflex, "{name}"'](thick, CPU).speedup == predicted(name, thick, CPU)


@pytest.fixture
def gpu(monkeypatch):
    """One of a name, whose kernels are Hopper's."""
    monkeypatch.setattr(machine, "obstacle", lambda device: "")
    monkeypatch.setattr(machine, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(flash, "q_rows", lambda device: flash.HOPPER)
    return lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def test_predictions_of_a_gpu_are_estimates(gpu):
    gpu("NVIDIA H200")
    boxes, sizes = fast_path.Problem(TILED.spec).boxes, (TILED.heads, TILED.head_dim)
    of_cuda = gnaflex.estimate(boxes, *sizes, device="H200", backend="cuda").speedup
    assert predicted("cuda", TILED, CUDA) == of_cuda != predicted("cuda", TILED, CPU)
    ragged = Problem("", GNA((12, 24, 24), 5), 24, 1)
    tile = advice.cheapest_layout(ragged.spec).q_tile
    tiles = Plan(ragged.spec, tile, tile, "static")
    of_flex = gnaflex.estimate(tiles, 24, 128, device="H200", backend="flex").speedup
    assert predicted("flex", ragged, CUDA) == of_flex != predicted("flex", ragged, CPU)
    assert predicted("flash", LITTLE, CUDA) == pytest.approx(ratio(LITTLE, 128))  # whose rate nobody knows
    assert predicted("flex", LITTLE, CUDA) == predicted("flex", LITTLE, CPU)  # row-major, which has no tiles
    text = replace(TILED, suffix=9)
    assert [predicted(name, text, CUDA) for name in ("cuda", "flex")] == [
        predicted(name, text, CPU) for name in ("cuda", "flex")
    ]


def test_an_unknown_gpu_gets_the_ratio_of_pairs(gpu):
    gpu("NVIDIA Z9")
    for name in ("cuda", "flex"):
        assert predicted(name, TILED, CUDA) == predicted(name, TILED, CPU)
