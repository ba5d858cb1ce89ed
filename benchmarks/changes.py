"""What moved between two results files, beyond the spread that both measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Key = tuple[str, ...]
Rows = dict[Key, dict[str, Any]]
LEAST = 1.05  # times: what is not worth a line
NO_SPREAD = {"first_s": 1.5, "mask_ms": 1.5, "peak_mib": 1.3, "mask_peak_mib": 1.3}  # of one measurement
FLOOR = {"first_s": 0.2, "mask_ms": 1.0, "peak_mib": 16.0, "mask_peak_mib": 16.0}  # below which nothing shows


class Change(NamedTuple):
    """A figure that moved: its new value by the old one, and both in words."""

    what: str
    ratio: float | None
    old: str
    new: str


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Of two files' items, what both measured and what moved; then what no longer runs, or runs now.

    A time counts as moved when the ranges of both runs lie apart. Times of a problem are first divided by
    those of its best dense attention in the same run and direction, so that a slower machine does not show.
    """
    before, after = _rows(old), _rows(new)
    common = [key for key in after if key in before]
    found = [change for key in common for change in _moved(key, before, after)]
    return sorted(found, key=lambda change: -(max(change.ratio, 1 / change.ratio) if change.ratio else 1e9))


def shared(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """How many rows both files have."""
    return len(_rows(old).keys() & _rows(new).keys())


def tell(found: Iterable[Change], count: int) -> None:
    """A line for each, of ``count`` rows that were compared."""
    lines = [
        f"  {one.what}: {one.old} -> {one.new}" + (f" ({one.ratio:.2f} times)" if one.ratio else "")
        for one in found
    ]
    head = "moved beyond the spread" if lines else "nothing moved beyond the spread"
    print("\n".join([f"of {count} rows in both files, {head}", *lines]))


def _rows(items: Mapping[str, Any]) -> Rows:
    """Timings and figures of all items, by what they are of."""
    rows: Rows = {}
    for name, item in items.items():
        for row in item["rows"]:
            if "provider" in row:
                rows[row["problem"], row["provider"], row["direction"]] = row
            elif "what" in row:
                rows[name, row["what"]] = row
            elif "subject" in row:
                rows[row["subject"], f"{row['tokens']} tokens"] = row
    return rows


def _moved(key: Key, before: Rows, after: Rows) -> Iterator[Change]:
    old, new = before[key], after[key]
    what = ", ".join(key)
    if bool(old.get("why")) != bool(new.get("why")):
        yield Change(what, None, old.get("why") or "ran", new.get("why") or "runs")
        return
    if old.get("why"):
        return
    yield from _time(what, key, before, after)
    for name, most in NO_SPREAD.items():
        if name not in old or name not in new or max(old[name], new[name]) < FLOOR[name]:
            continue
        ratio = max(new[name], 1e-9) / max(old[name], 1e-9)
        if not 1 / most <= ratio <= most:
            yield Change(f"{what}: {name}", ratio, f"{old[name]:.3g}", f"{new[name]:.3g}")


def _time(what: str, key: Key, before: Rows, after: Rows) -> Iterator[Change]:
    """The time of a call, or a generic figure."""
    field = "ms" if "ms" in after[key] else "median"
    units = [_dense(rows, key) for rows in (before, after)]
    if None in units or not all(field in rows[key] for rows in (before, after)):
        units = [1.0, 1.0]
    old, new = ([rows[key][name] / unit for name in ("low", field, "high")]
                for rows, unit in zip((before, after), units, strict=True))  # fmt: skip
    if not old[1] > 0 or not new[1] > 0:
        return
    ratio = new[1] / old[1]
    apart = new[0] > old[2] or new[2] < old[0]
    if apart and not 1 / LEAST <= ratio <= LEAST:
        shown = [f"{rows[key][field]:.4g} {rows[key].get('unit', 'ms')}" for rows in (before, after)]
        yield Change(what, ratio, *shown)


def _dense(rows: Rows, key: Key) -> float | None:
    """The best dense time of a problem and direction; 1 for what is dense itself, or no such thing."""
    if len(key) != 3 or key[1].startswith("dense"):
        return 1.0
    times = [
        row["ms"] for (problem, provider, direction), row in _triples(rows)
        if (problem, direction) == (key[0], key[2]) and provider.startswith("dense") and "ms" in row
    ]  # fmt: skip
    return min(times, default=None)


def _triples(rows: Rows) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    for key, row in rows.items():
        if len(key) == 3:
            yield (key[0], key[1], key[2]), row
