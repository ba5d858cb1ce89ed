"""What the trial of a kernel covers, counted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.fast_path import Problem
from gnaflex.cuda_backend.tile_walk import Q_ROWS, chosen, item_tiles, launches, tile_counts

from gnaflex.planner import Plan
from gnaflex.spec import GNA
from gnaflex.trial import cases

BOXES = (
    ((2, 8, 8), (2, 8, 8)),
    ((8, 16), (8, 16)),
    ((2, 4, 16), (1, 8, 16)),
    ((128,), (128,)),
    ((8,), (48,)),
)
CONFIGS = [
    KernelConfig(arch, "bfloat16", dim, *boxes, text)
    for arch in ("sm_90a", "sm_100a")
    for boxes in BOXES
    for dim in (64, 128)
    for text in (False, True)
]
IN_PAIRS = [one for one in CONFIGS if BOXES_AT_ONCE[one.arch] == 2]


def launches_of(config, case):
    plan = Plan(case.spec, config.q_box, config.kv_box, "dynamic", math.prod(config.q_box))
    return launches(plan, BOXES_AT_ONCE[config.arch])


def items_of_blocks(config, case):
    """Per launch and block: of its items, one after another, how many key tiles there are, and how many of
    them each half sees. The rounds by which blocks with more text start later are left out."""
    halves, line = BOXES_AT_ONCE[config.arch], sum(-(-n // config.kv_rows) for n in case.texts)
    for number, launch in enumerate(launches_of(config, case)):
        boxes = launch.work.reshape(-1, halves, *launch.work.shape[1:])
        each = tile_counts(boxes[:, :, 2], config.kv_box).prod(2)
        each += line * (each > 0)
        items = [*zip((item_tiles(boxes, config.kv_box) + line).tolist(), each.tolist(), strict=True)]
        items *= math.prod(launch.groups) * case.heads * case.batch
        if number == 0:
            whole = -(-case.spec.num_tokens // config.kv_rows) + line
            count = sum(-(-n // Q_ROWS) for n in case.texts[:2])
            text = [(whole, [whole] * halves)] * (count // halves)
            text += [(whole, [whole, 0])] * (count % halves)
            items = text * case.heads * case.batch + items
        blocks = min(case.blocks or 132, len(items))
        yield from (items[block::blocks] for block in range(blocks))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.name)
def test_items_start_at_every_stage_and_phase(config):
    """On Blackwell a tile takes two stages, one for its keys, one for its values."""
    starts, at_once = set(), BOXES_AT_ONCE[config.arch]
    for case in cases(config):
        for mine in items_of_blocks(config, case):
            at = 0
            for tiles, _ in mine:
                starts.add((at % config.stages, at // config.stages % 2))
                at += at_once * tiles
    stages = range(0, config.stages, 1 if config.stages % at_once else at_once)
    assert starts == {(stage, phase) for stage in stages for phase in range(2)}


@pytest.mark.parametrize("config", IN_PAIRS, ids=lambda one: one.name)
def test_halves_start_in_every_phase_and_follow_any_others(config):
    """What a half has seen before decides the phases of its barriers."""
    starts, next_to = set(), set()
    for case in cases(config):
        for mine in items_of_blocks(config, case):
            before, was = [0, 0], True
            for _, seen in mine:
                starts |= {(h, before[h] % 2) for h in range(2) if seen[h]}
                next_to.add((was, is_there := seen[1] > 0))
                before, was = [a + b for a, b in zip(before, seen, strict=True)], is_there
    assert starts == set(itertools.product(range(2), range(2)))
    assert next_to == set(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("config", IN_PAIRS, ids=lambda one: one.name)
def test_every_kind_of_pair(config):
    found = set()
    for case in cases(config):
        for launch in launches_of(config, case):
            first, second = launch.work[::2], launch.work[1::2]
            is_none = (second[:, 2] == 0).any(1)
            later = (second[:, 1, 0] - first[:, 1, 0]) // config.kv_box[0]
            ends = later + tile_counts(second[:, 2], config.kv_box)[:, 0]
            ends -= tile_counts(first[:, 2], config.kv_box)[:, 0]
            found |= {*zip(np.minimum(later, 1).tolist(), (ends > 0).tolist(), is_none.tolist(), strict=True)}
        assert not config.text or not any(case.texts[:2]) or sum(-(-n // Q_ROWS) for n in case.texts[:2]) % 2
    assert found >= {(0, False, False), (1, True, False), (0, False, True)}


@pytest.mark.parametrize("config", [one for one in CONFIGS if one.text], ids=lambda one: one.name)
def test_some_blocks_have_a_text_query_more_than_others_and_boxes_after(config):
    found = 0
    for case in cases(config):
        queries = sum(-(-n // Q_ROWS) for n in case.texts[:2]) * case.heads * case.batch
        if case.blocks and queries % case.blocks and queries > case.blocks:
            found += 1
    assert found


def test_a_trial_is_small_for_every_boxes_that_problems_take():
    """Tokens of the largest case: boxes that lie along different axes make it large."""
    seen = set()
    for shape in (
        (30, 48, 80),
        (33, 45, 80),
        (16, 44, 80),
        (30, 80, 30),
        (24, 24, 96),
        (12, 100, 60),
        (256, 256),
    ):
        for window in ((8, 8, 30), (18, 24, 24), (12, 6, 48), (80, 80)):
            if len(window) != len(shape) or any(w > n for w, n in zip(window, shape, strict=True)):
                continue
            for stride in ((8, 4, 8), (16, 8, 8), (1, 8, 16), (12, 6, 4), (16, 16), (4, 64)):
                if len(stride) == len(shape) and all(s <= w for s, w in zip(stride, window, strict=True)):
                    plan = chosen(GNA(shape, window, stride))
                    if plan is not None:
                        problem = Problem(plan.spec)
                        seen |= {problem.config(arch, torch.bfloat16, 128) for arch in BOXES_AT_ONCE}
    assert len(seen) > 10
    sizes = {config.name: max(case.spec.num_tokens for case in cases(config)) for config in seen}
    assert max(sizes.values()) < 60_000, max(sizes.items(), key=lambda one: one[1])
