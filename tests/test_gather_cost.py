"""What "sdpa" costs on a CPU, against a count over its own tiles, and where "auto" takes it for that."""

from __future__ import annotations

import pytest
import torch

import gnaflex
from gnaflex import advice, dispatch, flex, gather, gather_cost
from gnaflex.dispatch import Call
from gnaflex.gather_tiles import KEY_PAIRS, cut_of, kinds_of, load_of
from gnaflex.layout import Layout
from gnaflex.order import Document, Order
from gnaflex.origin import record_of
from gnaflex.spec import GNA

CPU = torch.device("cpu")
SPARSE = GNA((16, 32, 64), (4, 8, 8))  # blocks of 128 tokens cover its windows badly: 1.6 times its boxes
FULL = GNA((4, 48, 40), (2, 24, 24), (2, 8, 8))  # block-sparse
ORDERS = {
    "3-D": Order((Document(Layout(GNA((5, 9, 12), (3, 4, 5)))),)),
    "dilated, causal": Order((Document(Layout(GNA((11, 13), (3, 4), 2, (2, 3), (True, False)))),)),
    "tile-major": Order((Document(Layout(GNA((5, 9, 12), (3, 4, 5)), (2, 4, 4), (2, 4, 4))),)),
    "text": Order((Document(Layout(GNA((9, 12), 4)), prefix=7, suffix=30, extra_kv=3),)),
    "long text": Order((Document(Layout(GNA((96, 128), 4, 4)), suffix=5000),)),
    "packed": Order((Document(Layout(GNA((9, 12), 4)), suffix=3), Document(Layout(GNA((30,), 5, 5))))),
}


def tensors(spec, heads=1, dim=64, dtype=torch.float32, more=0):
    return [torch.empty(1, heads, spec.num_tokens + more, dim, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("group", [1, 3])
def test_work_is_that_of_the_tiles(name, group):
    order = ORDERS[name]
    q, k, v = (torch.empty(2, heads, 999, 16) for heads in (2 * group, 2, 2))
    load = load_of(k.flatten(0, 1), v.flatten(0, 1), group, False, gather.MEMORY_BYTES)
    kinds = kinds_of(order, tuple(cut_of(one, load) for one in order.documents), CPU)
    total = 0
    for kind in (one for some in kinds.kinds for one in some):
        keys = kind.keys(slice(None)).numel()
        total += keys * (kind.queries.shape[1] + KEY_PAIRS)
    assert gather.work(q, k, v, order) == total


def chosen(spec, score_mod=None, dtype=torch.float32, **mask):
    """What "auto" takes under a mask in the order that costs FlexAttention least."""
    tile = mask.pop("q_tile", advice.cheapest_layout(spec).q_tile)
    bm = gnaflex.block_mask(spec, q_tile=tile, kv_tile=tile, device="cpu", **mask)
    more = bm.seq_lengths[0] - spec.num_tokens
    q, k, v = tensors(spec, dtype=dtype, more=more)
    call = Call(q, k, v, score_mod, bm, record_of(bm), None, False, None, None)
    return dispatch.choose(call, "auto"), call


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(dispatch.compiled, "cpu_obstacle", lambda: "")


@pytest.mark.parametrize("spec, name", [(SPARSE, "sdpa"), (FULL, "flex"), (GNA((8, 8, 8), 3), "flex")])
def test_auto_takes_the_cheaper_one(spec, name):
    found, call = chosen(spec)
    assert found == name
    assert dispatch.choose(call, "flex") == "flex"  # by name nothing is weighed


def test_it_weighs_pairs_against_pairs(monkeypatch):
    _, call = chosen(SPARSE)
    blocks = flex.listed_blocks(call.record) * 128**2
    ratio = blocks / gather.work(*call[:3], call.record.order)
    for factor, name in ((0.99, "sdpa"), (1.01, "flex")):
        monkeypatch.setattr(gather_cost, "BY_FLEX", factor * ratio)
        assert dispatch.choose(call, "auto") == name
    monkeypatch.undo()
    monkeypatch.setattr(gather_cost, "LEAST_PAIRS", blocks + 1)
    assert not gather_cost.cheaper(call)
    monkeypatch.setattr(gather_cost, "LEAST_PAIRS", blocks)
    assert gather_cost.cheaper(call)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score},
        {"padding": torch.tensor([[16, 32, 60]])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_was_not_measured_stays_with_flex(change):
    assert chosen(SPARSE)[0] == "sdpa"
    assert chosen(SPARSE, **change)[0] == "flex"


def test_windows_per_head_stay_with_flex():
    bm = gnaflex.block_mask([SPARSE, GNA(SPARSE.shape, (4, 8, 16))], device="cpu")
    call = Call(*tensors(SPARSE, heads=2), None, bm, record_of(bm), None, False, None, None)
    assert not gather_cost.cheaper(call)
    assert (
        gather_cost.hours(call)
        == pytest.approx(  # as if all heads had the costliest window
            2 * gather_cost.PAIR_S / 3600 * max(gather.work(*call[:3], order) for order in call.record.orders)
        )
    )


def test_text_counts():
    """Text that everything sees fills blocks well, so that there is less to gain."""
    assert chosen(SPARSE, suffix=64)[0] == "sdpa"
    assert chosen(SPARSE, suffix=8192)[0] == "flex"


def test_explain_says_why():
    _, call = chosen(SPARSE, q_tile=None)
    found = gnaflex.explain(*call[:3], call.block_mask)
    assert found.backend == "sdpa"
    (why,) = found.reasons["flex"]
    assert why.startswith('"auto" does not take it: its blocks hold ')


def test_attention_takes_it_in_row_major_order(monkeypatch):
    seen = []
    monkeypatch.setitem(dispatch.RUN, "sdpa", lambda call: seen.append(call) or call.query)
    monkeypatch.setattr("gnaflex.routes.to_order", lambda *x: pytest.fail("nothing is permuted for it"))
    grid = torch.empty(1, *SPARSE.shape, 1, 64)
    gnaflex.attention(grid, grid, grid, SPARSE.window)
    (call,) = seen
    assert not call.record.order.is_tiled


def test_counts_are_made_once(monkeypatch):
    _, call = chosen(SPARSE)
    monkeypatch.setattr(gather, "work", lambda *x: pytest.fail("again"))
    monkeypatch.setattr(gather_cost, "listed_blocks", lambda *x: pytest.fail("again"))
    assert dispatch.choose(call, "auto") == "sdpa"
    with pytest.raises(pytest.fail.Exception):  # other sizes cost otherwise
        dispatch.choose(call._replace(query=call.query.expand(-1, 2, -1, -1)), "auto")


def test_hours():
    _, call = chosen(SPARSE)
    many = call._replace(query=call.query.expand(3, -1, -1, -1))
    each = gather_cost.PAIR_S * gather.work(*call[:3], call.record.order) / 3600
    assert gather_cost.hours(call) == pytest.approx(each)
    assert gather_cost.hours(many) == pytest.approx(3 * each)
    assert gather_cost.hours(call._replace(record=None)) == 0
