"""Pictures of what was measured: what they show of a file, what is left out and said, the same every time."""

from __future__ import annotations

import builtins
import json

import pytest
from matplotlib.colors import to_rgb

from benchmarks import engine, plot, results
from benchmarks.results import Results, load

HERE = {"device": "cpu", "cpu": "A CPU", "cores": 2, "torch": "2.13.0", "date": "2026-11-21"}
THERE = HERE | {"device": "A GPU"}
SIZES = [2**n for n in range(10, 17)]


def point(subject, tokens, ms, peak_mib):
    return {"subject": subject, "tokens": tokens, "ms": ms, "peak_mib": peak_mib}


GROWTH = [
    *(point("block_mask, tile-major", n, n / 1e4, n / 1e5) for n in SIZES),
    *(point("create_block_mask, eager", n, (n / 1e3) ** 2, 2e-3 * n**1.5) for n in SIZES[:4]),
    *(point('gnaflex, "cuda", stride 4x8x8', n, n / 1e4, 0.0) for n in SIZES),
    *(point("dense, flash", n, n**2 / 1e5, 1.0) for n in SIZES[:2]),
    {"subject": "dense, flash", "tokens": 4096, "why": "too long"},
]


def facts(problem, work_speedup=4.0):
    return {"problem": problem, "facts": {}, "tokens": 7680, "work_speedup": work_speedup}


def timing(problem, provider, speedup=None, direction="forward"):
    row = {"problem": problem, "provider": provider, "direction": direction}
    return row | ({"why": "no"} if speedup is None else {"ms": 1.0, "speedup": speedup})


BACKENDS = [
    facts("one"),
    {"problem": "one", "provider": "dense, flash", "direction": "forward", "ms": 1.0},
    timing("one", "NATTEN", 0.5),
    timing("one", 'gnaflex, "flex"', 3.0),
    timing("one", 'gnaflex, "flash"'),
    timing("one", 'gnaflex, "sdpa"', 9.0, "both"),
    facts("two", 8.0),
    timing("two", "somebody new", 2.0),
    timing("two", "FlexAttention, create_block_mask", 1.5),
    facts("none ran"),
    timing("none ran", "NATTEN"),
]


def write(folder, name, rows, environment=HERE):
    items = {"a": {"status": "ok", "seconds": 1.0, "rows": rows, "why": ""}}
    engine.write(folder / f"{name}.json", environment, items)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "growth", GROWTH)
    write(tmp_path, "backends", BACKENDS)
    return tmp_path


def draw(folder, out="out"):
    return plot.main([str(folder), "--out", str(folder / out)])


def growth(rows=GROWTH, environment=HERE):
    figure = plot.growth_figure(Results(environment, rows))
    figure.draw_without_rendering()
    return figure


def backends(rows=BACKENDS):
    figure = plot.backends_figure(Results(HERE, rows))
    figure.draw_without_rendering()
    return figure


def words(figure):
    return [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text"))]


# ---- results files -----------------------------------------------------------------------------------


def test_rows_come_by_kind_and_in_order(tmp_path):
    items = {
        name: {"rows": rows} for name, rows in (("a", BACKENDS), ("b", GROWTH), ("c", [facts("one", 5.0)]))
    }
    (tmp_path / "all.json").write_text(json.dumps({"environment": HERE, "items": items}))
    found = load(tmp_path / "all.json")
    assert found.environment == HERE
    assert found.rows == [*BACKENDS, *GROWTH, facts("one", 5.0)]
    assert found.points == GROWTH
    assert [row["provider"] for row in found.timings] == [
        row["provider"] for row in BACKENDS if "provider" in row
    ]
    assert {name: row["work_speedup"] for name, row in found.facts.items()} == {
        "one": 5.0, "two": 8.0, "none ran": 4.0
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"environment": {}, "items": {"a": []}}',
        '{"environment": {}, "items": []}',
        '{"items": {}}',
    ],
)
def test_what_is_no_results_file_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some\.json is not a results file"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "other.json")


# ---- the command -------------------------------------------------------------------------------------


def test_both_pictures_are_drawn_and_the_same_each_time(folder, capsys):
    assert (draw(folder), draw(folder, "again")) == (0, 0)
    assert capsys.readouterr().out.count("drawn from") == 4
    for name in ("growth.png", "backends.png"):
        picture = (folder / "out" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert picture == (folder / "again" / name).read_bytes()


@pytest.mark.parametrize("there, missing", [("growth", "backends"), ("backends", "growth")])
def test_a_picture_without_a_file_is_left_out_in_a_line(folder, capsys, there, missing):
    (folder / f"{missing}.json").unlink()
    assert draw(folder) == 0
    assert f"{missing}.png: not drawn, there is no {folder / missing}.json\n" in capsys.readouterr().out
    assert [path.name for path in (folder / "out").iterdir()] == [f"{there}.png"]


def test_a_picture_of_a_damaged_or_empty_file_is_left_out_in_a_line(folder, capsys):
    (folder / "growth.json").write_text("{")
    write(folder, "backends", [facts("one")])
    assert draw(folder) == 2
    out = capsys.readouterr().out
    assert "growth.png: not drawn, " in out
    assert "is not a results file" in out
    assert "backends.png: not drawn, the file has no speed-up over dense attention\n" in out
    write(folder, "growth", [GROWTH[-1]])
    assert draw(folder) == 2
    assert "growth.png: not drawn, the file has no points\n" in capsys.readouterr().out


def test_nothing_to_draw_says_what_to_run(tmp_path, capsys):
    assert draw(tmp_path) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"nothing to draw in {tmp_path}: python -m benchmarks.run growth backends"


def test_the_folder_is_that_of_this_machine(folder, monkeypatch, capsys):
    (folder / "a-cpu-2-cores").mkdir()
    monkeypatch.setattr(plot, "RESULTS", folder)
    monkeypatch.setattr(plot, "environment", lambda: HERE)
    write(folder / "a-cpu-2-cores", "growth", GROWTH)
    monkeypatch.chdir(folder)
    assert plot.main([]) == 0
    assert [path.name for path in (folder / "docs").iterdir()] == ["growth.png"]


def test_without_matplotlib_it_says_what_to_install(folder, monkeypatch, capsys):
    real = builtins.__import__

    def no_matplotlib(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    assert draw(folder) == 1
    assert capsys.readouterr().out == "pictures need matplotlib: pip install 'gnaflex[demo]'\n"


# ---- growth ------------------------------------------------------------------------------------------


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_a_line_per_subject_with_its_exponent():
    masks, attention, mask_memory, attention_memory = growth().axes
    assert [*lines(masks)] == ["create_block_mask, eager: $N^{2.00}$", "block_mask, tile-major: $N^{1.00}$"]
    assert [*lines(attention)] == ["dense, flash", 'gnaflex, "cuda", stride 4x8x8: $N^{1.00}$']
    assert [*lines(mask_memory)] == [
        "create_block_mask, eager: $N^{1.50}$",
        "block_mask, tile-major: $N^{1.00}$",
    ]
    assert attention.lines[1].get_color() == plot.ATTENTION['gnaflex, "cuda"'][0]
    assert [*lines(attention_memory)] == ["dense, flash"]  # the other took nothing that can be seen
    assert [line.get_label() for line in masks.lines] == [
        text.get_text() for text in masks.get_legend().get_texts()
    ]


def test_lines_stand_at_their_points_and_end_where_the_walk_did():
    masks, attention, memory, _ = growth().axes
    eager, ours = masks.lines
    assert [*eager.get_xdata()] == SIZES[:4]
    assert [*ours.get_ydata()] == [n / 1e4 for n in SIZES]
    assert [*memory.lines[1].get_ydata()] == [n / 1e5 for n in SIZES]
    assert [*attention.lines[0].get_xdata()] == SIZES[:2]
    assert (
        {ax.get_xscale() for ax in (masks, memory)} == {ax.get_yscale() for ax in (masks, memory)} == {"log"}
    )


def test_every_subject_has_a_look_of_its_own():
    names = [*plot.MASKS, *plot.ATTENTION]
    rows = [point(name, n, n / 1e4, 1.0) for name in names for n in SIZES]
    masks, attention, *_ = growth([*rows, *(point("somebody", n, 1.0, 1.0) for n in SIZES)]).axes
    for ax, styles, others in ((masks, plot.MASKS, 0), (attention, plot.ATTENTION, 1)):
        assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == len(styles) + others
        assert len({line.get_marker() for line in ax.lines}) == len(styles) + others


def test_the_key_stands_above_the_lines():
    figure = growth()
    for ax in figure.axes:
        key = ax.get_legend().get_window_extent()
        tops = [ax.transData.transform(line.get_xydata()).max(0)[1] for line in ax.lines]
        assert max(tops) < key.y0


def test_the_dtype_and_the_machine_are_those_of_the_device():
    assert any("float32" in text for text in words(growth()))
    assert "A CPU, 2 cores, torch 2.13.0, 2026-11-21" in words(growth())
    there = words(growth(environment=THERE))
    assert any("bfloat16" in text for text in there)
    assert "A GPU, torch 2.13.0, 2026-11-21" in there


def test_figures_have_units_a_reader_knows():
    masks, _, memory, _ = growth().axes
    on = [
        [tick.get_text() for tick in axis.get_ticklabels()]
        for axis in (memory.xaxis, masks.yaxis, memory.yaxis)
    ]
    assert {"1k", "10k", "100k", "1M"} <= {*on[0]}
    assert {"1 ms", "100 ms", "1 s"} <= {*on[1]}
    assert {"32 KiB", "1 MiB", "32 MiB", "1 GiB"} <= {*on[2]}
    assert plot._memory(2**-20, 0) == "1 B"


# ---- backends ----------------------------------------------------------------------------------------


def shown(ax):
    """Bars by the y of their middle: provider, where they begin and end; the bands; the ticks."""
    names = {
        round(y, 4): text.get_text() for y, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    }
    bars, bands = [], []
    for patch in ax.patches:
        span = patch.get_x(), round(patch.get_x() + patch.get_width(), 4)
        middle = round(patch.get_y() + patch.get_height() / 2, 4)
        if patch.get_height() < plot.BAR:
            bars.append((names[middle], *span))
        else:
            bands.append((*span, round(patch.get_height() / plot.BAR)))
    return bars, bands


def test_a_bar_per_provider_that_ran_forward_in_one_order():
    bars, _ = shown(backends().axes[0])
    assert bars == [
        ('gnaflex, "flex"', 1, 3.0), ("NATTEN", 1, 0.5),
        ("FlexAttention", 1, 1.5), ("somebody new", 1, 2.0),
    ]  # fmt: skip


def test_what_is_achievable_is_a_band_and_a_tick_behind_the_bars_of_a_problem():
    (ax,) = backends().axes
    _, bands = shown(ax)
    assert bands == [(1, 4.0, 2), (1, 8.0, 2)]
    ticks = [line for line in ax.lines if line.get_xdata()[0] != 1]
    assert [tuple(line.get_xdata()) for line in ticks] == [(4.0, 4.0), (8.0, 8.0)]
    assert any([*line.get_xdata()] == [1, 1] for line in ax.lines)  # dense
    assert ax.get_xscale() == "log"


def test_problems_are_named_with_their_size_and_what_they_allow():
    found = words(backends())
    assert "one  (7,680 tokens, achievable 4)" in found
    assert not any("none ran" in text for text in found)
    assert {"3", "0.5", "1.5", "2"} <= {*found}  # the bars' figures


def test_all_that_is_drawn_stands_inside():
    (ax,) = backends().axes
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert low < 0.5
    assert high > 8
    for patch in ax.patches:
        assert top < patch.get_y() < patch.get_y() + patch.get_height() < bottom


def test_figures_stand_beside_their_bars_and_dense_is_in_the_picture():
    (ax,) = backends().axes
    ends = {text.get_text(): text.get_window_extent() for text in ax.texts}
    at = {value: ax.transData.transform((value, 0))[0] for value in (0.5, 3.0)}
    assert ends["0.5"].x1 < at[0.5]
    assert at[0.5] < ends["3"].x0 < ends["3"].x1 < at[3.0]  # inside, where it has room
    (ax,) = backends([facts("one"), timing("one", "NATTEN", 1.25)]).axes
    (figure,) = (text for text in ax.texts if text.get_text() == "1.25")
    assert figure.get_window_extent().x0 > ax.transData.transform((1.25, 0))[0]
    assert backends([facts("one"), timing("one", "NATTEN", 2.0)]).axes[0].get_xlim()[0] < 1


def test_a_very_slow_provider_does_not_squeeze_the_others():
    (ax,) = backends([facts("one"), timing("one", "NATTEN", 0.01)]).axes
    assert 0.1 < ax.get_xlim()[0] < plot.SHORTEST
    assert "\N{LEFTWARDS ARROW} 0.01" in {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("color", plot.BARS.values())
def test_figures_on_bars_are_as_readable_as_can_be(color):
    def luminance(name):  # WCAG 2.1
        linear = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(name))
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(name):
        dark, light = sorted((luminance(color), luminance(name)))
        return (light + 0.05) / (dark + 0.05)

    assert contrast(plot._on(color)) == max(map(contrast, (plot.INK, "white"))) > 3


def test_of_many_problems_the_first_are_drawn():
    rows = [row for at in range(20) for row in (facts(f"p{at}"), timing(f"p{at}", "NATTEN", 2.0))]
    found = words(backends(rows))
    assert "Forward: speed-up over the best dense attention, the first 12 of 20 problems" in found
    assert sum(text.startswith("p") and "achievable" in text for text in found) == 12
    assert "Forward: speed-up over the best dense attention" in words(backends())


def test_results_are_not_taken_for_a_picture_of_another_kind():
    with pytest.raises(plot.Empty):
        plot.growth_figure(Results(HERE, BACKENDS))
    with pytest.raises(plot.Empty):
        plot.backends_figure(Results(HERE, GROWTH))
    assert results.Results(HERE, GROWTH).facts == {}
