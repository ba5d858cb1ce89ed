"""What the kernels load, count and store, by their own integer code on the CPU, against the oracle.

Needs CuTe DSL (pip install 'gnaflex[cuda]'), no GPU.
"""

from __future__ import annotations

import random
from math import lcm, prod
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gnaflex.cuda_backend import machine
from gnaflex.cuda_backend.abi import PARTS
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.fast_path import Lane, Prepared, Problem, layout_obstacle, of_plan
from gnaflex.cuda_backend.tile_walk import Q_ROWS

from gnaflex.planner import Plan
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA

pytest.importorskip("cutlass", reason="kernels need CuTe DSL: pip install 'gnaflex[cuda]'")
from hopper import hopper  # noqa: F401
from host_walk import ITEM, KEY, KIND, MARKS, QUERY, RESULT, TILE, Walk, marked

BLOCKS = [part.name for part in PARTS].index("blocks") - len(PARTS)  # among the numbers, from their end
CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_ENTRIES = 300_000  # of the logs of a call
MOST_PAIRS = 8_000_000  # of stored rows and keys
CALLS = 30  # per configuration, or more until all features were met
MOST_CALLS = 200
CONFIGS = [
    KernelConfig("sm_90a", *rest)
    for rest in (
        ("bfloat16", 64, (2, 8, 8), (2, 8, 8), False),
        ("bfloat16", 128, (2, 8, 8), (2, 8, 8), True),
        ("bfloat16", 64, (1, 5, 24), (3, 4, 8), False),
        ("float16", 64, (1, 5, 24), (3, 4, 8), True),
        ("bfloat16", 64, (3, 5, 8), (3, 2, 8), True),
        ("bfloat16", 128, (2, 2, 4), (2, 2, 4), False),
        ("bfloat16", 64, (2, 1, 4), (2, 4, 2), True),
        ("float16", 128, (8, 16), (4, 4), False),
        ("bfloat16", 64, (16, 1), (5, 16), True),
        ("bfloat16", 64, (4, 8), (8, 16), True),
        ("bfloat16", 64, (128,), (128,), False),
        ("bfloat16", 64, (16,), (32,), True),
        ("bfloat16", 128, (8,), (48,), True),
    )
] + [
    KernelConfig("sm_100a", *rest)
    for rest in (
        ("bfloat16", 128, (2, 8, 8), (2, 8, 8), False),
        ("bfloat16", 64, (2, 8, 8), (2, 8, 8), True),
        ("float16", 64, (1, 5, 24), (3, 4, 8), True),
        ("bfloat16", 64, (2, 2, 4), (2, 2, 4), False),
        ("bfloat16", 64, (2, 1, 4), (2, 4, 2), True),
        ("float16", 128, (8, 16), (4, 4), False),
        ("bfloat16", 64, (4, 8), (8, 16), True),
        ("bfloat16", 64, (16,), (32,), True),
    )
]


class Call(NamedTuple):
    """Tensors, launches and valid extra keys; how many items there are (halves of a pair one each), and log
    entries at most."""

    problem: Problem
    query: torch.Tensor
    key: torch.Tensor
    launches: tuple[Prepared, ...]
    valid: torch.Tensor
    items: int
    entries: int

    def __repr__(self) -> str:
        tensors = ", ".join(f"{tuple(x.shape)} by {x.stride()}" for x in (self.query, self.key))
        return f"{self.problem}, query and key {tensors}, valid {self.valid}"


# ---- random calls ------------------------------------------------------------------------------------


def random_axis(rng, most, q, step):
    """Length, window (a multiple of ``step`` if it fits), stride, dilation, causal of an axis where boxes of
    ``q`` queries need no mask."""
    while True:
        dilation = rng.choice((1, 1, 1, 2, 3))
        room = max(most // dilation, 1)
        tokens = rng.randint(min(step, room), room)
        length = tokens * dilation + rng.randrange(dilation)
        window = rng.choice((tokens, rng.randint(1, tokens), rng.randint(1, tokens)))
        window = window // step * step or window
        stride = rng.choice((rng.randint(1, window), max(window // q, 1) * q, q, lcm(q, step)))
        axis = (length, window, min(stride, window), dilation, rng.random() < 0.4)
        if Plan(GNA(*axis), (q,), (1,), "dynamic").is_block_sparse:
            return axis


def random_spec(rng, config):
    rank, room, axes = config.rank, rng.choice((100, 700, 2500)), {}
    steps = config.kv_box if rng.random() < 0.4 else (1,) * rank  # so that whole tiles are not rare
    for left, a in zip(range(rank, 0, -1), rng.sample(range(rank), rank), strict=True):
        most = min(room, round(2 * room ** (1 / left)))
        axes[a] = random_axis(rng, most, config.q_box[a], steps[a])
        room = max(room // axes[a][0], 1)
    return GNA(*zip(*(axes[a] for a in range(rank)), strict=True))


def random_texts(rng, config):
    """Tokens of every run of extra ones; all 0 without text, and only then."""
    rows = config.kv_rows
    while True:
        runs = [rng.choice((0, 0, rng.randint(1, rows), rows, rng.randint(rows + 1, 300))) for _ in range(3)]
        if any(runs):
            return runs if config.text else (0, 0, 0)


def random_valid(rng, batch, texts):
    """How many tokens of a run are keys, [batch or 1, runs]."""
    rows, dtype = rng.choice((1, batch)), rng.choice((torch.int32, torch.int64))
    runs = [n for n in texts if n]
    each = [[rng.choice((0, n, n + 7, -300, rng.randint(0, n))) for n in runs] for _ in range(rows)]
    return torch.tensor(each, dtype=dtype)


def laid_out(rng, marks, config):
    """A tensor with these marks, by strides that a call may have: its dimensions in memory in any order, as
    part of a larger tensor (packed queries, keys and values are), or one batch entry or head for all."""
    shape = list(marks.shape[:3])
    if rng.random() < 0.4:
        shape[rng.choice((0, 1))] = 1
    order = rng.sample(range(3), 3) if rng.random() < 0.8 else range(3)
    spare = [rng.choice((0, 0, 0, 1, 2 * n)) for n in shape]
    channels = config.head_dim + rng.choice((0, 0, 8))
    x = torch.full([*(shape[a] + spare[a] for a in order), channels], -2, dtype=torch.int16)
    x = x.permute(*(list(order).index(a) for a in range(3)), 3)
    for a in range(3):
        x = x.narrow(a, rng.randint(0, spare[a]), shape[a])
    x[..., :3] = marks[: shape[0], : shape[1]]
    return x[..., : config.head_dim].view(DTYPES[config.dtype]).expand(*marks.shape[:3], -1)


def sizes(plan, texts):
    """Items, and entries of the log, of a head of a batch entry where all keys are valid."""
    rows = prod(plan.kv_tile)
    text_items = sum(-(-n // Q_ROWS) for n in texts[:2])
    text_tiles = sum(-(-n // rows) for n in texts)
    grid_tiles = -(-plan.spec.num_tokens // rows)
    items = plan.query_tiles + text_items
    tiles = plan.touched_tiles + items * text_tiles + text_items * grid_tiles
    return items, items * Q_ROWS + tiles * rows


def random_call(rng, config):
    """A call whose logs are not too long."""
    while True:
        problem = Problem(random_spec(rng, config), *random_texts(rng, config))
        plan = Plan(problem.spec, config.q_box, config.kv_box, "dynamic", Q_ROWS)
        batch, kv_heads, share = rng.randint(1, 3), rng.randint(1, 4), rng.choice((1, 1, 2, 3, 4))
        each, heads = batch * kv_heads * share, kv_heads * share
        queries = problem.spec.num_tokens + problem.prefix + problem.suffix
        keys = queries + problem.extra_kv
        items, entries = (n * each for n in sizes(plan, problem.texts))
        if heads <= 4 and each * queries * keys <= MOST_PAIRS and entries <= MOST_ENTRIES:
            query = laid_out(rng, marked(batch, heads, queries), config)
            key = laid_out(rng, marked(batch, kv_heads, keys), config)
            assert not layout_obstacle("query", query) + layout_obstacle("key", key)
            launches, valid = of_plan(problem, plan, CPU, BOXES_AT_ONCE[config.arch])
            if any(problem.texts) and rng.random() < 0.7:
                valid = random_valid(rng, batch, problem.texts)
            return Call(problem, query, key, launches, valid, items, entries)


FEATURES = {"dilation", "uneven groups", "window", "tiles", "whole tiles", "GQA", "batch", "shared keys"}
TEXT_FEATURES = {"runs", "tiles of text", "valid per entry"}
PAIR_FEATURES = {"later", "no half", "another end"}  # and with text
TEXT_PAIR_FEATURES = {"no half of text"}


def needed(config):
    """What the calls of a configuration must have."""
    of_pairs = PAIR_FEATURES | (TEXT_PAIR_FEATURES if config.text else set())
    return (
        FEATURES
        | (TEXT_FEATURES if config.text else set())
        | (of_pairs if BOXES_AT_ONCE[config.arch] == 2 else set())
    )


def features(call, config):
    """What there is in a call, so that no test passes for want of it."""
    spec, texts = call.problem.spec, call.problem.texts
    keys = np.concatenate([one.work[:, 2].numpy() for one in call.launches])
    keys = keys[keys.all(1)]
    found = {
        "dilation": prod(spec.dilation) > 1,
        "uneven groups": len(call.launches) > 1,
        "window": any(w * d + d <= n for n, w, d in zip(spec.shape, spec.window, spec.dilation, strict=True)),
        "tiles": (keys > config.kv_box).any(),
        "whole tiles": (keys % config.kv_box == 0).all(1).any(),
        "GQA": call.query.shape[1] > call.key.shape[1] > 1,
        "batch": call.query.shape[0] > 1,
        "shared keys": 0 in call.key.stride(),
        "runs": all(texts),
        "tiles of text": max(texts[:2]) > Q_ROWS,
        "valid per entry": len(call.valid.unique(dim=0)) > 1,
    }
    if BOXES_AT_ONCE[config.arch] == 2:
        work = np.concatenate([one.work.numpy() for one in call.launches])
        first, second = work[::2, 1:], work[1::2, 1:]
        is_none = (second[:, 1] == 0).any(1)
        tiles = sum(-(-n // Q_ROWS) for n in texts[:2])
        found |= {
            "later": (first[:, 0] != second[:, 0]).any(),
            "another end": (first.sum(1) != second.sum(1))[~is_none].any(),
            "no half": is_none.any(),
            "no half of text": tiles % 2,
        }
    return {name for name, is_there in found.items() if is_there}


# ---- what the kernel does with them ------------------------------------------------------------------


def walked(walk, call):
    """The log of all launches of a call, their items numbered from 0 on; every block of a launch has one."""
    logs, items, halves = [], 0, BOXES_AT_ONCE[walk.config.arch]

    def launch(*numbers):
        logs.append(walk(*numbers, entries=call.entries).numpy())
        at_once = logs[-1][:, ITEM].max() // halves + 1
        assert numbers[BLOCKS] == min(machine.multiprocessors(CPU), at_once)
        return 0

    tensors = call.query, call.key, call.key
    Lane(*tensors, call.launches, launch, None, call.valid)(*tensors)
    for log in logs:
        log[:, ITEM] += items
        items = log[:, ITEM].max() + 1
    log = np.concatenate(logs)
    found, log[:, ITEM] = np.unique(log[:, ITEM], return_inverse=True)  # a half that is none has no entries
    assert len(found) == call.items
    return log


def marks(x):
    """[batch, heads, tokens, 3]: what lies in a tensor."""
    return x.view(torch.int16)[..., :3].numpy()


def seen(call):
    """Who must see whom: bool [batch, queries, keys]."""
    problem, batch = call.problem, call.query.shape[0]
    mask = dense_mask(problem.spec, prefix=problem.prefix, suffix=problem.suffix, extra_kv=problem.extra_kv)
    known = np.ones((batch, call.key.shape[2]), bool)
    first = np.cumsum([0, problem.prefix + problem.spec.num_tokens, problem.suffix])
    runs = [(lo, n) for lo, n in zip(first, problem.texts, strict=True) if n]
    for b, valid in enumerate(call.valid.expand(batch, -1).tolist()):
        for (lo, n), count in zip(runs, valid, strict=False):  # [0] where there is no run
            known[b, lo + max(count, 0) : lo + n] = False
    return mask.numpy() & known[:, None]


def check_queries(call, log):
    """Every row is stored once, of the query at its place. Returns the item, batch entry, head and row of all
    that is stored."""
    shape = call.query.shape[:3]
    stored = log[(log[:, KIND] == QUERY) & (log[:, RESULT] >= 0)]
    assert np.array_equal(np.sort(stored[:, RESULT]), np.arange(prod(shape)))
    place = np.unravel_index(stored[:, RESULT], shape)
    assert np.array_equal(stored[:, MARKS], marks(call.query)[place])
    return stored[:, ITEM], *place


def check_tiles(log, tile_rows):
    """An item's tiles come in their order, the first is 0; no tile has no key."""
    tiles = log[log[:, KIND] == KEY].reshape(-1, tile_rows, log.shape[1])
    assert (tiles[:, :, RESULT] == 1).any(1).all()
    item, number = tiles[:, 0, ITEM], tiles[:, 0, TILE]
    order = np.argsort(item, kind="stable")
    place = np.arange(len(item)) - np.searchsorted(item[order], item[order])
    assert np.array_equal(number[order], place)


def check_keys(call, log, stored):
    """What is stored has seen its keys, each once, and no others."""
    item, b, h, row = stored
    keys, share = call.key.shape[2], call.query.shape[1] // call.key.shape[1]
    tiles = log[log[:, KIND] == KEY]
    counted = tiles[tiles[:, RESULT] == 1]

    owner = np.full((call.items, 2), -1)
    owner[item] = np.stack([b, h // share], 1)
    assert (owner >= 0).all()
    assert np.array_equal(owner[item], np.stack([b, h // share], 1))

    entry, head = owner[counted[:, ITEM]].T
    token = counted[:, MARKS.start]
    assert (token >= 0).all()
    assert np.array_equal(counted[:, MARKS], marks(call.key)[entry, head, token])
    times = np.bincount(counted[:, ITEM] * keys + token, minlength=call.items * keys)
    times = times.reshape(call.items, keys)
    assert times.max() == 1
    assert np.array_equal((times == 1)[item], seen(call)[b, row])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.name)
def test_every_row_is_stored_once_and_every_key_is_counted_once(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # CuTe DSL may leave files
    rng, walk, met, calls = random.Random(config.name), Walk(config), set(), 0
    while calls < CALLS or not met >= needed(config):
        calls += 1
        assert calls <= MOST_CALLS, needed(config) - met
        call = random_call(rng, config)
        met |= features(call, config)
        log = walked(walk, call)
        check_tiles(log, config.kv_rows)
        check_keys(call, log, check_queries(call, log))
        if (
            BOXES_AT_ONCE[config.arch] == 2 and not config.text
        ):  # whole boxes are stored, cut off as they are loaded
            rows = log[log[:, KIND] == QUERY]
            assert np.array_equal(rows[:, MARKS.start] >= 0, rows[:, RESULT] >= 0)
