"""What moved between two results files, and what did not."""

from __future__ import annotations

import pytest

from benchmarks import changes


def timing(provider, ms, problem="video", direction="forward", spread=0.1, **more):
    """A row whose runs lie within ``spread`` of its median; ms may be a reason instead."""
    key = {"problem": problem, "provider": provider, "direction": direction}
    if isinstance(ms, str):
        return key | {"why": ms}
    return key | {"ms": ms, "low": ms * (1 - spread), "high": ms * (1 + spread), "runs": 5} | more


def items(*rows, name="item"):
    return {name: {"status": "ok", "rows": list(rows)}}


def moved(old, new):
    return {one.what: one for one in changes.moved(items(*old), items(*new))}


DENSE = timing("dense, flash", 100.0)


def test_within_the_spread_nothing_moves():
    assert moved([DENSE, timing("flex", 10.0)], [DENSE, timing("flex", 11.9)]) == {}


@pytest.mark.parametrize("ms, ratio", [(13.0, 1.3), (8.0, 0.8)])
def test_beyond_it_something_does(ms, ratio):
    (found,) = moved([DENSE, timing("flex", 10.0)], [DENSE, timing("flex", ms)]).values()
    assert found.ratio == pytest.approx(ratio)
    assert (found.what, found.old, found.new) == ("video, flex, forward", "10 ms", f"{ms:g} ms")


def test_a_small_change_is_not_worth_a_line():
    narrow = {"spread": 0.001}
    old = [DENSE, timing("flex", 10.0, **narrow)]
    assert moved(old, [DENSE, timing("flex", 10.4, **narrow)]) == {}
    assert moved(old, [DENSE, timing("flex", 10.6, **narrow)])


def test_a_slower_machine_does_not_show():
    old = [DENSE, timing("flex", 10.0)]
    found = moved(old, [timing("dense, flash", 200.0), timing("flex", 20.0)])
    assert list(found) == ["video, dense, flash, forward"]  # dense itself is told as it is
    found = moved(old, [timing("dense, flash", 200.0), timing("flex", 10.0)])
    assert found["video, flex, forward"].ratio == pytest.approx(0.5)
    # the best dense one is the yardstick, of the same direction
    more = [timing("dense, cuDNN", 50.0), timing("dense, flash", 1.0, direction="both")]
    assert moved([*old, *more], [DENSE, *more, timing("flex", 10.0)]) == {}


def test_without_dense_times_stand_for_themselves():
    assert moved([timing("flex", 10.0)], [timing("flex", 20.0)])["video, flex, forward"].ratio == 2
    assert moved([DENSE, timing("flex", 10.0)], [timing("flex", 10.0)]) == {}


@pytest.mark.parametrize(
    "field, old, new, shows",
    [
        ("first_s", 5.0, 9.0, True),
        ("first_s", 5.0, 6.0, False),
        ("first_s", 0.01, 0.1, False),  # too little to care
        ("mask_ms", 4.0, 2.0, True),
        ("peak_mib", 100.0, 140.0, True),
        ("peak_mib", 1.0, 9.0, False),
        ("peak_mib", 0.0, 90.0, True),
        ("mask_peak_mib", 30.0, 3.0, True),
    ],
)
def test_figures_without_a_spread(field, old, new, shows):
    found = moved([timing("flex", 10.0, **{field: old})], [timing("flex", 10.0, **{field: new})])
    assert list(found) == [f"video, flex, forward: {field}"] * shows


def test_what_runs_or_no_longer_does():
    found = moved(
        [timing("flex", 10.0), timing("cuda", "no GPU"), timing("sdpa", "no memory")],
        [timing("flex", "WRONG: 3"), timing("cuda", 1.0), timing("sdpa", "no time")],
    )
    assert {(one.what, one.old, one.new, one.ratio) for one in found.values()} == {
        ("video, flex, forward", "ran", "WRONG: 3", None),
        ("video, cuda, forward", "no GPU", "runs", None),
    }


def test_figures_and_points():
    def figure(median):
        return {"what": "dispatch", "median": median, "low": median, "high": median, "unit": "us"}

    def point(ms):
        return {"subject": "mask", "tokens": 1024, "ms": ms, "low": ms, "high": ms}

    found = moved([figure(10.0), point(1.0)], [figure(20.0), point(3.0)])
    assert {one.what: (one.ratio, one.new) for one in found.values()} == {
        "item, dispatch": (2, "20 us"),
        "mask, 1024 tokens": (3, "3 ms"),
    }
    assert moved([figure(0.0)], [figure(1.0)]) == {}  # a ratio to nothing says nothing


def test_what_one_file_lacks_is_left_out_and_the_largest_comes_first(capsys):
    old = [timing(name, 10.0) for name in ("a", "b", "c", "gone")]
    new = [timing(name, ms) for name, ms in (("a", 15.0), ("b", 2.0), ("c", "no"), ("new", 1.0))]
    found = changes.moved(items(*old), items(*new))
    assert [one.what.split(", ")[1] for one in found] == ["c", "b", "a"]
    assert changes.shared(items(*old), items(*new)) == 3
    changes.tell(found, 3)
    assert capsys.readouterr().out.splitlines() == [
        "of 3 rows in both files, moved beyond the spread",
        "  video, c, forward: ran -> no",
        "  video, b, forward: 10 ms -> 2 ms (0.20 times)",
        "  video, a, forward: 10 ms -> 15 ms (1.50 times)",
    ]
    changes.tell([], 0)
    assert capsys.readouterr().out == "of 0 rows in both files, nothing moved beyond the spread\n"
