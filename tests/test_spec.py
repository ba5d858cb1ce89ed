"""GNA: every rule, the text of its messages, and how it behaves as a value."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
import re

import numpy
import pytest
import torch
from cases import NATTEN_CASES, all_1d, random_spec, specs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gnaflex.spec import GNA, Axis, GNAError

HUNYUAN = GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))


def refusal(*args, **kwargs) -> str:
    with pytest.raises(GNAError) as caught:
        GNA(*args, **kwargs)
    return str(caught.value)


def remedy(message: str) -> GNA:
    """The problem that a message proposes, built from the code in the message."""
    (code,) = re.findall(r"Write (GNA\(.*\))\.$", message)
    return eval(code, {"GNA": GNA})


# ------------------------------------------------------------------------------------- arguments to fields


def test_scalars_hold_on_every_axis():
    spec = GNA((8, 9), 4, 2, 2, True)
    assert spec == GNA((8, 9), (4, 4), (2, 2), (2, 2), (True, True))
    assert GNA((8, 9), 4) == GNA((8, 9), (4, 4), (1, 1), (1, 1), (False, False))
    assert GNA(8, 4) == GNA((8,), (4,))


@pytest.mark.parametrize(
    "integers",
    [
        tuple,
        list,
        numpy.array,
        torch.tensor,
        torch.Size,
        lambda entries: numpy.array(entries, dtype=numpy.uint8),
        lambda entries: [numpy.int32(entry) for entry in entries],
        lambda entries: [torch.tensor(entry, dtype=torch.int16) for entry in entries],
    ],
)
def test_integers_of_every_kind_become_plain_ones(integers):
    spec = GNA(integers((8, 12)), integers((4, 3)), integers((2, 3)), integers((1, 4)))
    assert spec == GNA((8, 12), (4, 3), (2, 3), (1, 4))
    assert {type(entry) for axis in spec.axes for entry in axis} == {int, bool}
    assert repr(spec) == "GNA(shape=(8, 12), window=(4, 3), stride=(2, 3), dilation=(1, 4))"


@pytest.mark.parametrize("scalar", [numpy.int64, numpy.array, torch.tensor])
def test_scalars_of_every_kind_hold_on_every_axis(scalar):
    assert GNA((8, 9), scalar(4), scalar(2), scalar(2)) == GNA((8, 9), 4, 2, 2)
    assert GNA(scalar(8), 4) == GNA(8, 4)


@pytest.mark.parametrize(
    "flags", [numpy.array([True, False]), torch.tensor([True, False]), [numpy.True_, False]]
)
def test_flags_of_every_kind_become_plain_ones(flags):
    spec = GNA((8, 9), 4, is_causal=flags)
    assert spec.is_causal == (True, False)
    assert {type(flag) for flag in spec.is_causal} == {bool}
    assert GNA((8, 9), 4, is_causal=flags[0]).is_causal == (True, True)


def test_minus_one_is_the_whole_axis():
    assert GNA((8, 9), -1).window == (8, 9)
    assert GNA((8, 9, 10), (-1, 3, -1), dilation=(3, 1, 4)).window == (2, 3, 2)
    assert GNA((8, 9), (-1, -1), stride=(8, 9)).stride == (8, 9)


def test_max_dilation_spreads_the_window_over_the_axis():
    assert GNA((16, 44, 80), (16, 4, 16), dilation="max").dilation == (1, 11, 5)
    assert GNA((17, 44), (4, 4), dilation=("max", 2)).dilation == (4, 2)
    for spec in all_1d(8):
        (axis,) = spec.axes
        assert GNA(axis.length, axis.window, dilation="max").dilation[0] >= axis.dilation


def test_what_natten_refuses_is_welcome():
    assert GNA((1, 5, 1), (1, 1, 1)).num_tokens == 5
    assert GNA((2,) * 6, 2).rank == 6


def test_every_valid_axis_is_accepted_unchanged():
    for spec in (*NATTEN_CASES, *all_1d(9)):
        for length, window, stride, dilation, _ in spec.axes:
            assert 1 <= stride <= window
            assert dilation >= 1
            assert window * dilation <= length


# ------------------------------------------------------------------------------------------- derived facts


def test_axes_rank_and_tokens():
    spec = GNA((7, 9), (3, 2), (2, 1), (2, 3), (True, False))
    assert spec.axes == (Axis(7, 3, 2, 2, True), Axis(9, 2, 1, 3, False))
    assert spec.rank == 2
    assert spec.num_tokens == 63


def test_group_lengths_count_the_tokens_of_each_dilation_group():
    for length in range(1, 20):
        for dilation in range(1, length + 1):
            lengths = Axis(length, 1, 1, dilation, False).group_lengths
            assert lengths == tuple(len(range(group, length, dilation)) for group in range(dilation))
            assert list(lengths) == sorted(lengths, reverse=True)
            assert len(set(lengths)) <= 2


# ------------------------------------------------------------------------------------------------- a value


def test_equal_problems_are_one_key():
    same = GNA([30, 48, 80], numpy.array([18, 24, 24]), [16, 8, 8], 1, False)
    assert same == HUNYUAN
    assert hash(same) == hash(HUNYUAN)
    assert {same: 1}[HUNYUAN] == 1
    assert (
        len({GNA(8, 4), GNA(8, 4, 2), GNA(8, 4, 1, 2), GNA(8, 4, is_causal=True), GNA(9, 4), GNA(8, 3)}) == 6
    )
    assert GNA(8, 4) != (8, 4)


@pytest.mark.parametrize("name", ["shape", "window", "stride", "dilation", "is_causal", "anything"])
def test_fields_are_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(HUNYUAN, name, (1, 2, 3))


@given(specs(max_tokens=10_000))
@example(HUNYUAN)
def test_repr_copy_and_pickle_give_the_problem_back(spec):
    assert spec.num_tokens == math.prod(axis.length for axis in spec.axes)  # both are cached from here on
    others = [eval(repr(spec)), copy.copy(spec), copy.deepcopy(spec), dataclasses.replace(spec)]
    others += [
        pickle.loads(pickle.dumps(spec, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ]
    for other in others:
        assert other == spec
        assert hash(other) == hash(spec)
        assert repr(other) == repr(spec)
        assert other.axes == spec.axes


def test_pickles_hold_the_fields_alone():
    assert HUNYUAN.axes
    assert sorted(HUNYUAN.__getstate__()) == ["dilation", "is_causal", "shape", "stride", "window"]


def test_repr_leaves_defaults_out():
    assert repr(GNA((8, 9), 4)) == "GNA(shape=(8, 9), window=(4, 4))"
    assert (
        repr(GNA(8, 4, 2, 2, True))
        == "GNA(shape=(8,), window=(4,), stride=(2,), dilation=(2,), is_causal=(True,))"
    )
    assert repr(GNA((8, 9), -1, dilation=(1, 3))) == "GNA(shape=(8, 9), window=(8, 3), dilation=(1, 3))"


def test_replacing_a_field_checks_the_rules_again():
    assert dataclasses.replace(HUNYUAN, stride=4).stride == (4, 4, 4)
    with pytest.raises(GNAError, match="stride must not exceed window"):
        dataclasses.replace(HUNYUAN, stride=20)


# --------------------------------------------------------------------------------------------- the messages

MESSAGES = {
    "stride above window": (
        {"shape": (32, 32, 32), "window": (8, 8, 8), "stride": (4, 9, 4)},
        "stride must not exceed window: axis 1 has stride=9 > window=8.\n"
        "  window=(8, 8, 8), stride=(4, 9, 4). "
        "Write GNA(shape=(32, 32, 32), window=(8, 8, 8), stride=(4, 8, 4)).",
    ),
    "stride below 1": (
        {"shape": (8, 8), "window": 4, "stride": (1, 0)},
        "stride must be at least 1: axis 1 has stride=0 < 1.\n"
        "  stride=(1, 0). Write GNA(shape=(8, 8), window=(4, 4)).",
    ),
    "window above length": (
        {"shape": (16, 44), "window": (20, 8), "stride": (18, 2)},
        "window * dilation must not exceed length: axis 0 has window*dilation=20*1=20 > length=16.\n"
        "  shape=(16, 44), window=(20, 8), dilation=(1, 1). "
        "Write GNA(shape=(16, 44), window=(16, 8), stride=(16, 2)).",
    ),
    "dilated window above length": (
        {"shape": (16, 44), "window": (5, 8), "dilation": (4, "max")},
        "window * dilation must not exceed length: axis 0 has window*dilation=5*4=20 > length=16.\n"
        "  shape=(16, 44), window=(5, 8), dilation=(4, 'max'). "
        "Write GNA(shape=(16, 44), window=(5, 8), dilation=(3, 5)).",
    ),
    "window below 1": (
        {"shape": 8, "window": 0},
        "window must be at least 1, or -1 for the whole axis: axis 0 has window=0 < 1.\n"
        "  window=(0,). Write GNA(shape=(8,), window=(8,)).",
    ),
    "dilation below 1": (
        {"shape": 8, "window": 3, "dilation": -2},
        "dilation must be at least 1: axis 0 has dilation=-2 < 1.\n"
        "  dilation=(-2,). Write GNA(shape=(8,), window=(3,)).",
    ),
    "dilation above length": (
        {"shape": (4, 6), "window": -1, "dilation": (1, 7)},
        "dilation must not exceed length: axis 1 has dilation=7 > length=6.\n"
        "  shape=(4, 6), dilation=(1, 7). Write GNA(shape=(4, 6), window=(4, 1), dilation=(1, 6)).",
    ),
    "whole axis and max": (
        {"shape": (4, 6), "window": (2, -1), "dilation": "max"},
        'window=-1 and dilation="max" each need the other to be given: axis 1 has both.\n'
        "  shape=(4, 6), window=(2, -1), dilation=('max', 'max'). "
        "Write GNA(shape=(4, 6), window=(2, 6), dilation=(2, 1)).",
    ),
    "empty axis": (
        {"shape": (4, 0), "window": 1},
        "shape must be positive: axis 1 has length=0 < 1.\n"
        "  shape=(4, 0). Write GNA(shape=(4, 1), window=(1, 1)).",
    ),
    "no axis": (
        {"shape": (), "window": 3},
        "shape must name at least one axis: got shape=().\n"
        "  Give the length of every axis. Write GNA(shape=(30, 48, 80), window=(18, 24, 24)).",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_name_rule_axis_numbers_and_remedy(case):
    arguments, message = MESSAGES[case]
    assert refusal(**arguments) == message
    remedy(message)


OTHER_MESSAGES = {
    "entries": (
        {"shape": (8, 8, 8), "window": (3, 3)},
        "window must have one entry per axis, or be a scalar: got 2 for rank 3.\n"
        "  window=(3, 3). Give 3 entries, or one scalar for every axis.",
    ),
    "float": (
        {"shape": (8, 8), "window": (3, 3.0)},
        "window must be an integer, or -1 for the whole axis: axis 1 has window=3.0 (float).\n"
        "  Use a Python, numpy or torch integer; floats and bools are not rounded or counted.",
    ),
    "periodic": (
        {"shape": (8, 8), "window": 3, "is_causal": (False, "circular")},
        "is_causal must be True or False: axis 1 has is_causal='circular' (str).\n"
        "  Periodic (circular) axes are not defined for GNA; pad the grid with wrapped tokens instead.",
    ),
}


@pytest.mark.parametrize("case", OTHER_MESSAGES)
def test_messages_about_the_kind_of_an_argument(case):
    arguments, message = OTHER_MESSAGES[case]
    assert refusal(**arguments) == message


NOT_INTEGERS = [
    True,
    2.0,
    "2",
    None,
    numpy.True_,
    numpy.float32(2),
    numpy.array([2, 2]),
    torch.tensor(2.0),
    torch.tensor(True),
    torch.tensor([2]),
    2j,
]


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", ["shape", "window", "stride", "dilation"])
def test_everything_but_integers_is_refused(name, value):
    arguments = {"shape": (8, 8), "window": (4, 4), "stride": (1, 1), "dilation": (1, 1)}
    arguments[name] = (arguments[name][0], value)
    assert refusal(**arguments).startswith(f"{name} must be an integer")


@pytest.mark.parametrize("word", ["max", "Max", ""])
def test_words_are_for_dilation_alone(word):
    for name in ("shape", "window", "stride"):
        assert f"{name} must be an integer" in refusal(**({"shape": 8, "window": 4} | {name: word}))
    if word != "max":
        assert 'dilation must be an integer, or "max": axis 0' in refusal(8, 4, dilation=word)


@pytest.mark.parametrize(
    "value", [1, 0, None, "yes", 1.0, numpy.int64(1), torch.tensor(1), numpy.array([True, False])]
)
def test_everything_but_flags_is_refused(value):
    assert refusal((8, 8), 4, is_causal=(False, value)).startswith("is_causal must be True or False: axis 1")


@pytest.mark.parametrize("name", ["window", "stride", "dilation", "is_causal"])
def test_the_number_of_entries_must_fit(name):
    flags = name == "is_causal"
    for count in (0, 1, 3):
        arguments = {"shape": (8, 8), "window": 4} | {name: (False if flags else 1,) * count}
        assert refusal(**arguments).startswith(
            f"{name} must have one entry per axis, or be a scalar: got {count} "
        )


def is_valid(length, window, stride, dilation) -> bool:
    """The rules of the definition, with -1 and "max" resolved."""
    if window == -1 and dilation == "max":
        return False
    if length < 1 or (window < 1 and window != -1) or (dilation != "max" and dilation < 1):
        return False
    dilation = length // window if dilation == "max" else dilation
    window = length // dilation if window == -1 and dilation else window
    return dilation >= 1 and 1 <= stride <= window and window * dilation <= length


NUMBERS = st.integers(-2, 9)
COLUMNS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS | st.just("max"))


@settings(max_examples=400)
@given(st.lists(COLUMNS, min_size=1, max_size=3), st.booleans())
def test_a_problem_is_refused_exactly_if_it_breaks_a_rule_and_its_remedy_is_valid(columns, is_causal):
    arguments = (*zip(*columns, strict=True), is_causal)
    broken = [axis for axis, column in enumerate(columns) if not is_valid(*column)]
    if not broken:
        spec = GNA(*arguments)
        assert spec.shape == tuple(column[0] for column in columns)
        return
    message = refusal(*arguments)
    assert f": axis {broken[0]} has " in message
    fixed = remedy(message)
    assert all(is_valid(*axis[:4]) for axis in fixed.axes)
    assert fixed.is_causal == (is_causal,) * len(columns)
    for axis, (length, window, stride, dilation) in enumerate(columns):
        if axis not in broken:
            assert fixed.axes[axis] == GNA(length, window, stride, dilation, is_causal).axes[0]


def test_random_specs_are_within_their_budget():
    rng = random.Random(0)
    drawn = [random_spec(rng, rank, 50) for rank in (1, 2, 3, 4) for _ in range(50)]
    assert max(spec.num_tokens for spec in drawn) <= 50
    assert any(
        length % dilation
        for spec in drawn
        for length, dilation in zip(spec.shape, spec.dilation, strict=True)
    )


def test_gna_errors_are_value_errors():
    assert issubclass(GNAError, ValueError)
