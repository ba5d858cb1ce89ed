"""The oracle against a more literal reading of the definition, facts free of any oracle, and NATTEN."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from cases import NATTEN_CASES, all_1d, causal_variants, random_spec, specs, with_causal
from hypothesis import given, settings
from joint import attend as plain_attention
from joint import joint_mask, row_major_mask

from gnaflex import reference
from gnaflex.reference import allowed_keys, dense_mask, masked_attention, reference_attention
from gnaflex.spec import GNA, Axis, GNAError

EPS = torch.finfo(torch.float64).eps


def pair_is_allowed(axis: Axis, x: int, y: int) -> bool:
    """The definition on one axis, line by line, for one pair of tokens."""
    L, w, s, d, is_causal = axis
    g, i = x % d, x // d
    n = math.ceil((L - g) / d)
    if y % d != g:
        return False
    j = y // d
    base = i - (i % s)
    if is_causal:
        leader = min(base + s - 1, n - 1)
        return max(leader - w + 1, 0) <= j <= i
    leader = min(base + s // 2, n - 1)
    lo = min(max(leader - w // 2, 0), n - w)
    return lo <= j < lo + w


def coordinates(shape):
    return list(itertools.product(*map(range, shape)))


def literal_mask(spec: GNA) -> list[list[bool]]:
    grid = coordinates(spec.shape)
    return [[all(map(pair_is_allowed, spec.axes, query, key)) for key in grid] for query in grid]


def key_lists(spec: GNA) -> list[set[int]]:
    return [allowed_keys(spec, query) for query in range(spec.num_tokens)]


def mixed_specs(count: int, max_tokens: int, ranks=(1, 2, 3, 4), seed: int = 0) -> list[GNA]:
    rng = random.Random(seed)
    return [random_spec(rng, rank, max_tokens) for rank in ranks for _ in range(count)]


def draw(mask: torch.Tensor) -> str:
    return "\n".join("".join("█" if seen else "·" for seen in row) for row in mask.tolist())


# ------------------------------------------------------------------------------------------------ the mask


def test_every_small_axis_follows_the_definition():
    for spec in all_1d(11):
        (axis,) = spec.axes
        for query, keys in enumerate(key_lists(spec)):
            assert keys == {key for key in range(axis.length) if pair_is_allowed(axis, query, key)}, spec


def test_random_grids_follow_the_definition():
    for spec in mixed_specs(25, 60):
        assert dense_mask(spec).tolist() == literal_mask(spec), spec


@settings(max_examples=40, deadline=None)
@given(specs(max_tokens=80))
def test_dense_mask_holds_the_allowed_keys(spec):
    mask = dense_mask(spec)
    assert mask.dtype == torch.bool
    assert mask.device.type == "cpu"
    assert [set(row.nonzero().flatten().tolist()) for row in mask] == key_lists(spec)


GOLDENS = {
    GNA(6, 3): """
███···
███···
·███··
··███·
···███
···███""",
    GNA(7, 4, 2): """
████···
████···
·████··
·████··
···████
···████
···████""",
    GNA(7, 4, 2, is_causal=True): """
█······
██·····
███····
████···
··███··
··████·
···████""",
    GNA(7, 2, dilation=2): """
█·█····
·█·█···
█·█····
·█·█···
··█·█··
···█·█·
····█·█""",
}


@pytest.mark.parametrize("spec", GOLDENS, ids=str)
def test_masks_derived_by_hand(spec):
    assert draw(dense_mask(spec)) == GOLDENS[spec].strip()


def test_queries_outside_the_grid_are_refused():
    for query in (-1, 6):
        with pytest.raises(GNAError, match=rf"query={query}, num_tokens=6.\n  Use .* range\(6\)"):
            allowed_keys(GNA((2, 3), 1), query)


def test_a_mask_that_would_not_fit_is_refused():
    video = GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
    with pytest.raises(GNAError) as refusal:
        dense_mask(video)
    assert str(refusal.value) == (
        "a dense mask must not exceed 4,000,000,000 pairs: 115,200 tokens make 13,271,040,000.\n"
        "  It needs 13.3 GB. Use allowed_keys(spec, query)."
    )
    assert len(allowed_keys(video, 57_600)) == math.prod(video.window)


# ------------------------------------------------------------------------------ facts free of any oracle


def groups(axis: Axis):
    return [range(group, axis.length, axis.dilation) for group in range(axis.dilation)]


def test_the_window_that_is_the_shape_is_dense():
    for spec in mixed_specs(10, 60):
        stride = tuple(min(2, length) for length in spec.shape)
        assert dense_mask(GNA(spec.shape, window=-1, stride=stride)).all()


def test_a_causal_window_that_is_the_axis_is_the_lower_triangle():
    for length in range(1, 12):
        for stride in range(1, length + 1):
            mask = dense_mask(GNA(length, length, stride, is_causal=True))
            assert torch.equal(mask, torch.ones(length, length, dtype=torch.bool).tril())


def test_stride_equal_to_a_window_that_divides_the_shape_is_blocked():
    shape, window = (8, 6, 3), (4, 2, 3)
    blocks = [tuple(c // w for c, w in zip(at, window, strict=True)) for at in coordinates(shape)]
    same = torch.tensor([[mine == other for other in blocks] for mine in blocks])
    assert torch.equal(dense_mask(GNA(shape, window, stride=window)), same)


def test_every_query_sees_the_whole_window_if_no_axis_is_causal():
    for spec in mixed_specs(25, 100):
        spec = with_causal(spec, (False,) * spec.rank)
        assert (dense_mask(spec).sum(1) == math.prod(spec.window)).all(), spec


def test_a_causal_query_sees_itself_and_nothing_behind():
    for spec in mixed_specs(25, 60):
        spec = with_causal(spec, (True,) * spec.rank)
        grid = coordinates(spec.shape)
        for query, keys in enumerate(key_lists(spec)):
            assert query in keys
            assert all(key <= mine for at in keys for key, mine in zip(grid[at], grid[query], strict=True))


def test_permuting_the_axes_permutes_the_mask():
    rng = random.Random(1)
    for spec in mixed_specs(15, 60, ranks=(2, 3, 4)):
        order = rng.sample(range(spec.rank), spec.rank)
        permuted = GNA(*(zip(*(spec.axes[axis] for axis in order), strict=True)))
        grid = dense_mask(spec).reshape(spec.shape * 2)
        grid = grid.permute(*order, *(spec.rank + axis for axis in order))
        assert torch.equal(grid.reshape(spec.num_tokens, -1), dense_mask(permuted)), (spec, order)


def test_reflection_of_an_axis_with_odd_window_and_stride():
    reflected = 0
    for spec in all_1d(15):
        (axis,) = spec.axes
        fits = axis.stride == 1 or (
            axis.stride % 2 == 1 and all(n % axis.stride == 0 for n in axis.group_lengths)
        )
        if axis.window % 2 == 1 and not axis.is_causal and fits:
            mask = dense_mask(spec)
            assert torch.equal(mask, mask.flip(0, 1)), spec
            reflected += 1
    assert reflected > 100


def test_windows_are_intervals_that_move_forward_without_gaps():
    for spec in all_1d(12):
        (axis,) = spec.axes
        for group in groups(axis):
            windows = [sorted(group.index(key) for key in allowed_keys(spec, query)) for query in group]
            for window in windows:
                assert window == list(range(window[0], window[-1] + 1)), spec
            for before, after in itertools.pairwise(windows):
                assert before[0] <= after[0] <= before[-1] + 1, spec
                assert before[-1] <= after[-1], spec


def inverse_window(axis: Axis, n: int, j: int) -> range:
    """The queries of a dilation group of length n that see key j, from the closed formulas."""
    w, s = axis.window, axis.stride
    wl, wr, off = w // 2, w // 2 + w % 2 - 1, s - s // 2 - 1
    if axis.is_causal:
        return range(j, min(((j + w) // s + (j + w >= n)) * s, n))
    start = 0 if j < w else (j - wr + off) // s * s
    end = n if j >= n - w else (j + wl + off + 1) // s * s
    return range(start, end)


def test_inverse_windows_follow_their_formulas():
    for spec in all_1d(13):
        (axis,) = spec.axes
        keys = key_lists(spec)
        for group in groups(axis):
            for j, key in enumerate(group):
                seen_by = [i for i, query in enumerate(group) if key in keys[query]]
                assert seen_by == list(inverse_window(axis, len(group), j)), (spec, key)


# ------------------------------------------------------------------------------------------- the attention


def tensors(spec: GNA, batch=1, heads=2, kv_heads=None, dim=4, value_dim=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, dim), (kv_heads or heads, dim), (kv_heads or heads, value_dim or dim))
    return [torch.randn(batch, *spec.shape, *size, generator=generator, dtype=dtype) for size in sizes]


def attend(spec: GNA, query, key, value, **options):
    return reference_attention(
        query, key, value, spec.window, spec.stride, spec.dilation, spec.is_causal, **options
    )


def heads_first(x):
    return x.flatten(1, -3).transpose(1, 2)


def sdpa(mask, query, key, value, scale=None):
    output = torch.nn.functional.scaled_dot_product_attention(
        *map(heads_first, (query, key, value)), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).unflatten(1, query.shape[1:-2])


def plain_lse(mask, query, key, scale=None):
    q, k = heads_first(query), heads_first(key)
    return plain_attention(q, k, k, mask, scale)[1].transpose(1, 2).unflatten(1, query.shape[1:-2])


def assert_equal_but_for_rounding(got, want, keys: int, sums: int = 1):
    """Equal in float64 but for one rounding per key and channel, in each of so many nested sums."""
    budget = sums * 8 * keys * EPS
    torch.testing.assert_close(got, want, rtol=budget, atol=budget)


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
def test_attention_is_sdpa_under_the_dense_mask(kv_heads, scale):
    for spec in mixed_specs(3, 70, seed=kv_heads):
        query, key, value = tensors(spec, batch=2, heads=6, kv_heads=kv_heads, dim=5, value_dim=3)
        mask = dense_mask(spec)
        output, lse = attend(spec, query, key, value, scale=scale, return_lse=True)
        assert output.shape == (2, *spec.shape, 6, 3)
        assert_equal_but_for_rounding(output, sdpa(mask, query, key, value, scale), spec.num_tokens)
        assert_equal_but_for_rounding(lse, plain_lse(mask, query, key, scale), spec.num_tokens)
        assert torch.equal(attend(spec, query, key, value, scale=scale), output)


def test_scalars_and_defaults_are_those_of_the_spec():
    spec = GNA((6, 5), 3)
    inputs = tensors(spec)
    assert torch.equal(reference_attention(*inputs, 3), attend(spec, *inputs))
    dilated = GNA((6, 5), (-1, 2), dilation=(1, "max"))
    assert torch.equal(reference_attention(*inputs, (-1, 2), dilation=(1, "max")), attend(dilated, *inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_the_results_and_of_the_computation(dtype):
    spec = GNA((5, 6), (3, 4), (2, 1))
    inputs = tensors(spec, dtype=dtype)
    output, lse = attend(spec, *inputs, return_lse=True)
    exact, exact_lse = attend(spec, *(x.double() for x in inputs), return_lse=True)
    assert output.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(output, exact.to(dtype))
    assert torch.equal(lse, exact_lse.to(lse.dtype))
    plain = attend(spec, *inputs, compute_dtype=dtype)
    assert plain.dtype == dtype
    assert torch.equal(plain, output) == (dtype == torch.float64)
    roundings = math.prod(spec.window) + inputs[0].shape[-1]
    assert (plain - output).abs().max() <= roundings * torch.finfo(dtype).eps * inputs[2].abs().max()


def test_chunks_change_nothing(monkeypatch):
    spec = GNA((5, 4, 3), (3, 2, 3), (2, 1, 3), is_causal=(False, True, False))
    inputs = tensors(spec, batch=2)

    def options():
        return {"return_lse": True, "score_mod": lambda score, b, h, q, k: score + (b + h) * (q - 2 * k) / 60}

    whole = attend(spec, *inputs, **options())
    softmax, rows = reference._attend, []
    monkeypatch.setattr(
        reference, "_attend", lambda s, mask, v: rows.append(s.shape[2]) or softmax(s, mask, v)
    )
    for queries in (1, 7):
        rows.clear()
        bytes_of_a_query = 2 * 2 * spec.num_tokens * 8 * reference._TEMPORARIES
        monkeypatch.setattr(reference, "_CHUNK_BYTES", queries * bytes_of_a_query)
        for got, want in zip(attend(spec, *inputs, **options()), whole, strict=True):
            assert_equal_but_for_rounding(got, want, spec.num_tokens)
        assert rows == [queries] * (60 // queries) + [60 % queries] * (60 % queries > 0)


def test_keys_that_a_query_does_not_see_do_not_count():
    spec = GNA((4, 6), (2, 3), is_causal=(True, False))
    query, key, value = tensors(spec)
    before = attend(spec, query, key, value)
    for token in (0, 9, 23):
        changed = [x.flatten(1, 2).clone() for x in (key, value)]
        for x in changed:
            x[:, token] += 100
        after = attend(spec, query, *(x.unflatten(1, spec.shape) for x in changed))
        differs = (before != after).flatten(1, 2).any((0, 2, 3))
        assert torch.equal(differs, dense_mask(spec)[:, token])


def test_gradients_are_those_of_sdpa():
    for spec in mixed_specs(2, 50, seed=5):
        inputs = tensors(spec, batch=2, heads=4, kv_heads=2)
        one = [x.clone().requires_grad_() for x in inputs]
        two = [x.clone().requires_grad_() for x in inputs]
        mask = dense_mask(spec)
        output, lse = attend(spec, *one, return_lse=True)
        want, want_lse = sdpa(mask, *two), plain_lse(mask, *two[:2])
        upstream, upstream_lse = torch.randn_like(output), torch.randn_like(lse)
        ours = torch.autograd.grad((output, lse), one, (upstream, upstream_lse))
        theirs = torch.autograd.grad((want, want_lse), two, (upstream, upstream_lse))
        for got, expected in zip(ours, theirs, strict=True):
            assert_equal_but_for_rounding(got, expected, spec.num_tokens, sums=4)


def test_numerical_gradients():
    spec = GNA((2, 3), (2, 2), (2, 1), is_causal=(False, True))
    inputs = [x.requires_grad_() for x in tensors(spec, heads=2, kv_heads=1, dim=2)]
    bias = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)

    def call(query, key, value, bias):
        return attend(
            spec,
            query,
            key,
            value,
            return_lse=True,
            score_mod=lambda score, b, h, q, k: score + bias[h, q, k],
        )

    assert torch.autograd.gradcheck(call, (*inputs, bias))
    if torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 has no second derivative of an indexed tensor inside a score_mod")
    assert torch.autograd.gradgradcheck(call, (*inputs, bias))


def test_score_mod_comes_before_the_mask_and_counts_tokens_row_major():
    for spec in mixed_specs(2, 40, seed=7):
        query, key, value = tensors(spec, batch=2, heads=4, kv_heads=2)
        bias = torch.randn(2, 4, spec.num_tokens, spec.num_tokens, dtype=torch.float64)
        output = attend(spec, query, key, value, score_mod=lambda s, b, h, q, k: s + bias[b, h, q, k])  # noqa: B023
        want = sdpa(bias.masked_fill(~dense_mask(spec), -torch.inf), query, key, value)
        assert_equal_but_for_rounding(output, want, spec.num_tokens)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_score_mod_has_the_signature_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spec = GNA((4, 6), (3, 2), (2, 1), (1, 3), (True, False))
    query, key, value = tensors(spec, batch=2, dim=8)
    mask = dense_mask(spec)

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(
            q_idx // 6 == kv_idx // 6, score * (h + 1), score - (q_idx - kv_idx).abs() * 0.1 - b
        )

    blocks = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, 24, 24, device="cpu")
    want = flex_attention(*map(heads_first, (query, key, value)), score_mod=score_mod, block_mask=blocks)
    output = attend(spec, query, key, value, score_mod=score_mod)
    assert_equal_but_for_rounding(heads_first(output), want, spec.num_tokens)


def test_a_query_whose_scores_are_all_minus_infinity_sees_nothing():
    spec = GNA(6, 3)
    inputs = [x.requires_grad_() for x in tensors(spec)]
    output, lse = attend(
        spec, *inputs, return_lse=True, score_mod=lambda s, b, h, q, k: torch.where(q == 2, -torch.inf, s)
    )
    assert (output[:, 2] == 0).all()
    assert (lse[:, 2] == -torch.inf).all()
    assert lse.isfinite().sum() == lse.numel() - 2
    gradients = torch.autograd.grad(output.sum() + lse[lse.isfinite()].sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, 2] == 0).all()


@pytest.mark.parametrize("score_mod", [None, lambda score, b, h, q, k: score + q - k])
def test_batch_of_size_zero(score_mod):
    spec = GNA((4, 3), 2)
    inputs = [x.requires_grad_() for x in tensors(spec, batch=0, heads=4, kv_heads=2, value_dim=7)]
    output, lse = attend(spec, *inputs, return_lse=True, score_mod=score_mod)
    assert output.shape == (0, 4, 3, 4, 7)
    assert lse.shape == (0, 4, 3, 4)
    (output.sum() + lse.sum()).backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


GOOD = zeros(1, 4, 5, 2, 8)
REFUSED_TENSORS = {
    "dimensions": ([zeros(4, 5, 8)] * 3, "got 3 dimensions < 4.\n  query is (4, 5, 8). Add"),
    "dtype": ([GOOD, GOOD.half(), GOOD], "one dtype: got torch.float32, torch.float16 and torch.float32.\n"),
    "device": (
        [GOOD, GOOD, GOOD.to("meta")],
        "share one device: got cpu, cpu and meta.\n  Write key.to(query.",
    ),
    "integer": ([GOOD.int()] * 3, "floating point: got torch.int32.\n  Write query.float(), key.float()"),
    "key grid": (
        [GOOD, zeros(1, 4, 6, 2, 8), GOOD],
        "key must fit query (1, 4, 5, 2, 8): got (1, 4, 6, 2, 8).\n  Give key the shape (1, 4, 5, 2, 8).",
    ),
    "key batch": ([GOOD, zeros(3, 4, 5, 2, 8), GOOD], "Give key the shape (1, 4, 5, 2, 8)."),
    "key head_dim": ([GOOD, zeros(1, 4, 5, 2, 9), GOOD], "Give key the shape (1, 4, 5, 2, 8)."),
    "key ndim": ([GOOD, zeros(8), GOOD], "key must fit query (1, 4, 5, 2, 8): got (8,)."),
    "value grid": ([GOOD, GOOD, zeros(1, 5, 4, 2, 3)], "Give value the shape (1, 4, 5, 2, 3)."),
    "value heads": ([GOOD, GOOD, zeros(1, 4, 5, 1, 8)], "Give value the shape (1, 4, 5, 2, 8)."),
    "heads": (
        [zeros(1, 4, 5, 3, 8), GOOD, GOOD],
        "must be a multiple of key heads: got 3 and 2.\n  Use a number of key heads that divides 3.",
    ),
    "no key heads": (
        [GOOD, zeros(1, 4, 5, 0, 8), zeros(1, 4, 5, 0, 8)],
        "multiple of key heads: got 2 and 0.",
    ),
    "no channel": ([zeros(1, 4, 5, 2, 0)] * 3, "head_dim must be at least 1: got head_dim=0.\n"),
    "window": ([zeros(1, 2, 5, 2, 8)] * 3, "window*dilation=3*1=3 > length=2"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused(case):
    inputs, message = REFUSED_TENSORS[case]
    with pytest.raises(GNAError) as refusal:
        reference_attention(*inputs, window=3)
    assert message in str(refusal.value)


# ----------------------------------------------------------- extra tokens, conditions, heads, documents


EXTRA_GOLDENS = """
███████
██··███
█·█·███
█··████
███████

████·····
██·█·····
█·██·····
····█████
····██··█
····███·█
····█·███"""


def test_masks_with_extra_tokens_and_documents_drawn_by_hand():
    one = dense_mask(GNA(3, 1), prefix=1, suffix=1, extra_kv=2)
    two = dense_mask([GNA(2, 1), GNA((1, 3), (1, 2), is_causal=(False, True))], prefix=1, extra_kv=1)
    assert [draw(one), draw(two)] == EXTRA_GOLDENS.strip().split("\n\n")


def random_text(rng) -> dict[str, int]:
    return {name: rng.choice((0, 0, 1, 2, 5)) for name in ("prefix", "suffix", "extra_kv")}


def test_dense_masks_with_extra_tokens_and_documents_follow_the_definition():
    rng = random.Random(2)
    for _ in range(60):
        documents = [random_spec(rng, rng.choice((1, 2, 3)), 40) for _ in range(rng.choice((1, 1, 2, 3)))]
        text = random_text(rng)
        assert torch.equal(dense_mask(documents, **text), torch.tensor(row_major_mask(documents, **text)))


def test_a_mask_with_extra_keys_that_would_not_fit_is_refused():
    with pytest.raises(GNAError, match="60,000 queries and 70,000 keys make 4,200,000,000"):
        dense_mask([GNA(30_000, 1)] * 2, extra_kv=5000)
    for documents, text, message in (
        ([], {}, "got none.\n  Give the GNA"),
        ([GNA(2, 1)], {"suffix": -1}, r"at least 0: got \(0, -1, 0\)"),
    ):
        with pytest.raises(GNAError, match=message):
            dense_mask(documents, **text)


def extras(count: int, batch=2, heads=2, dim=4, value_dim=None, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"extra_{name}": torch.randn(batch, count, heads, channels, generator=generator, dtype=torch.float64)
        for name, channels in (("keys", dim), ("values", value_dim or dim))
    }


@pytest.mark.parametrize("count", [0, 1, 5])
def test_extra_keys_are_keys_that_every_query_sees(count):
    for spec in mixed_specs(2, 40, seed=count):
        inputs = tensors(spec, batch=2, heads=6, kv_heads=2, value_dim=3)
        extra = extras(count, value_dim=3)
        keys = spec.num_tokens + count
        bias = torch.randn(2, 6, spec.num_tokens, keys, dtype=torch.float64)

        def score_mod(score, b, h, q, k, bias=bias):
            return score + bias[b, h, q, k]

        seen = torch.ones(spec.num_tokens, count, dtype=torch.bool)
        mask = torch.cat([dense_mask(spec), seen], 1)
        one, two = ([x.clone().requires_grad_() for x in (*inputs, *extra.values())] for _ in range(2))
        options = dict(zip(extra, one[3:], strict=True), scale=0.7, score_mod=score_mod, return_lse=True)
        out, lse = attend(spec, *one[:3], **options)
        k, v = (torch.cat([x.flatten(1, -3), more], 1) for x, more in zip(two[1:3], two[3:], strict=True))
        q, k, v = heads_first(two[0]), k.transpose(1, 2), v.transpose(1, 2)
        want = plain_attention(q, k, v, mask, 0.7, score_mod)
        want = [x.transpose(1, 2).unflatten(1, spec.shape) for x in want]
        upstream = [torch.randn_like(x) for x in want]
        gradients = torch.autograd.grad((out, lse), one, upstream), torch.autograd.grad(want, two, upstream)
        for got, expected in zip((out, lse, *gradients[0]), (*want, *gradients[1]), strict=True):
            assert_equal_but_for_rounding(got, expected, keys, sums=4)
        assert count == 0 or all((x != 0).any() for x in gradients[0][3:])


def test_extra_keys_that_do_not_fit_are_refused():
    spec, good = GNA((2, 3), 2), extras(4)
    inputs, (keys, values) = tensors(spec, batch=2), good.values()
    alone, alike = (
        "come together: one is None.\n  Give both",
        "key, extra_keys and extra_values must share one",
    )
    for options, message in (
        ({"extra_keys": keys}, alone),
        ({"extra_values": values}, alone),
        (good | {"extra_keys": keys[0]}, "extra_keys must fit key: got (4, 2, 4).\n  Give extra_keys the"),
        (good | {"extra_keys": keys[:1]}, "extra_keys must fit key: got (1, 4, 2, 4)."),
        (good | {"extra_keys": keys[..., :3]}, "Give extra_keys the shape (2, 4, 2, 4)."),
        (good | {"extra_values": values[:, :3]}, "must fit extra_keys and value: got (2, 3, 2, 4)."),
        (good | {"extra_values": values[:, :, :1]}, "Give extra_values the shape (2, 4, 2, 4)."),
        (good | {"extra_keys": keys.float()}, f"{alike} dtype: got torch.float64, torch.float32 and"),
        (good | {"extra_values": values.to("meta")}, f"{alike} device: got cpu, cpu and meta.\n  Write"),
    ):
        with pytest.raises(GNAError) as refusal:
            attend(spec, *inputs, **options)
        assert message in str(refusal.value)


def variants(rng, spec: GNA) -> GNA:
    """Another problem on the same grid."""
    flags = tuple(rng.random() < 0.5 for _ in spec.shape)
    return rng.choice([spec, with_causal(spec, flags), GNA(spec.shape, -1), GNA(spec.shape, 1)])


def sequences(queries: int, keys: int, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((4, queries, 5), (kv_heads, keys, 5), (kv_heads, keys, 3))
    return [torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in sizes]


def random_problem(rng):
    """The specs and keywords of a call for a batch of 2 and 4 heads: documents or conditions, or neither."""
    documents = [random_spec(rng, rng.choice((1, 2, 3)), 40) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    specs = [[variants(rng, spec) for spec in documents] for _ in range(rng.choice((1, 4)))]
    options = dict(random_text(rng))
    runs = [length for length in options.values() if length]
    if len(documents) == 1 and runs and rng.random() < 0.6:
        lengths = torch.tensor([[rng.randint(0, run + 1) for run in runs] for _ in range(rng.choice((1, 2)))])
        options["text_valid"] = lengths[:, 0] if len(runs) == 1 and rng.random() < 0.5 else lengths
    if len(documents) == 1 and rng.random() < 0.6:
        rows = [[rng.randint(0, n + 1) for n in documents[0].shape] for _ in range(rng.choice((1, 2)))]
        options["padding"] = torch.tensor(rows, dtype=torch.int32)
    if rng.random() < 0.4:
        options["where"] = lambda b, h, q, k: (q * 7 + k * 3 + h + 2 * b) % 5 > 1
    return specs, options


def test_masked_attention_is_plain_attention_under_the_joint_mask(monkeypatch):
    rng, empty_rows = random.Random(4), 0
    for number in range(80):
        specs, options = random_problem(rng)
        mask = joint_mask(specs, batch=2, heads=4, **options)
        tensors = sequences(*mask.shape[2:], kv_heads=rng.choice((1, 2, 4)), seed=number)
        mods = {"score_mod": lambda s, b, h, q, k: s * (h + 1) - (q - k).abs() / 9 + b} if number % 2 else {}
        monkeypatch.setattr(reference, "_CHUNK_BYTES", rng.choice((1, 20_000, 2**28)))
        one, two = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
        got = masked_attention(*one, specs, **options, **mods, return_lse=True)
        want = plain_attention(*two, mask, **mods)
        some = want[1].isfinite()
        empty_rows += (~some).sum().item()
        assert torch.equal(got[1] == -torch.inf, ~some)
        assert torch.equal(some, torch.tensor(mask.any(-1)))
        assert (got[0][~some] == 0).all()
        upstream = torch.randn_like(want[0]), torch.randn_like(want[1][some])
        gradients = (
            torch.autograd.grad((out, lse[some]), inputs, upstream)
            for (out, lse), inputs in ((got, one), (want, two))
        )
        for result, expected in zip((*got, *next(gradients)), (*want, *next(gradients)), strict=True):
            assert_equal_but_for_rounding(result, expected, mask.shape[3], sums=4)
    assert empty_rows > 1000


def test_invalid_text_keys_are_as_good_as_absent():
    spec, text = GNA((3, 4), (2, 3)), {"prefix": 3, "suffix": 2, "extra_kv": 4}
    query, key, value = sequences(17, 21)
    valid = torch.tensor([[1, 2, 0], [3, 0, 9]], dtype=torch.int32)
    out, lse = masked_attention(query, key, value, [[spec]], **text, text_valid=valid, return_lse=True)
    grid, shorter = range(3, 15), [(range(1), range(15, 17), ()), (range(3), (), range(17, 21))]
    for b, (before, behind, extra) in enumerate(shorter):
        asking, seen = [*before, *grid, *behind], [*before, *grid, *behind, *extra]
        short = {"prefix": len(before), "suffix": len(behind), "extra_kv": len(extra)}
        q, k, v = query[b : b + 1, :, asking], key[b : b + 1, :, seen], value[b : b + 1, :, seen]
        want, want_lse = masked_attention(q, k, v, [[spec]], **short, return_lse=True)
        assert_equal_but_for_rounding(out[b : b + 1, :, asking], want, 21)
        assert_equal_but_for_rounding(lse[b : b + 1, :, asking], want_lse, 21)
    text_rows = [*range(3), 15, 16]  # queries of text at or past its length still ask, for all there is
    there = torch.tensor([True] * 15 + [False] * 2 + [True] * 4)
    want, _ = plain_attention(query[1:, :, text_rows], key[1:], value[1:], there)
    assert_equal_but_for_rounding(out[1:, :, text_rows], want, 21)
    for rows in (valid[:1], valid[:1].expand(2, -1)):
        one = masked_attention(query, key, value, [[spec]], **text, text_valid=rows)
        assert torch.equal(one[0], out[0])


def test_padded_tokens_neither_see_nor_are_seen():
    spec = GNA((3, 4), (3, 2), is_causal=(False, True))
    inputs, extents = sequences(13, 14), torch.tensor([[2, 3], [3, 0]], dtype=torch.int32)

    def call(*inputs):
        return masked_attention(*inputs, [[spec]], suffix=1, extra_kv=1, padding=extents, return_lse=True)

    out, lse = call(*inputs)
    for b, valid in enumerate(([0, 1, 2, 4, 5, 6], [])):
        rows = [*valid, 12]
        assert torch.equal(lse[b].isfinite().all(0).nonzero().flatten(), torch.tensor(rows))
        assert (out[b, :, [at for at in range(13) if at not in rows]] == 0).all()
        seen = [*valid, 12, 13]
        mask = dense_mask(spec, suffix=1, extra_kv=1)[rows][:, seen]
        parts = (x[b : b + 1, :, at] for x, at in zip(inputs, (rows, seen, seen), strict=True))
        assert_equal_but_for_rounding(out[b : b + 1, :, rows], plain_attention(*parts, mask)[0], 14)
        for x in inputs:
            x[b, :, [at for at in range(12) if at not in valid]] += 100
    assert all(map(torch.equal, call(*inputs), (out, lse)))


def test_every_head_has_its_window():
    specs = [GNA((4, 5), 2), GNA((4, 5), (3, 5), is_causal=True), GNA((4, 5), 2), GNA((4, 5), 2, dilation=2)]
    query, key, value = sequences(20, 20)
    out = masked_attention(query, key, value, [[spec] for spec in specs])
    for head, spec in enumerate(specs):
        inputs = query[:, [head]], key[:, [head // 2]], value[:, [head // 2]]
        grids = [x.transpose(1, 2).unflatten(1, spec.shape) for x in inputs]
        assert_equal_but_for_rounding(out[:, [head]], heads_first(attend(spec, *grids)), 20)


def test_documents_attend_one_by_one():
    documents = [GNA((3, 4), 2), GNA(7, 3, 2), GNA((2, 2, 2), 1)]
    text = {"prefix": 2, "suffix": 1, "extra_kv": 3}
    sizes = [spec.num_tokens + 3 for spec in documents]
    parts = [sequences(size, size + 3, seed=size) for size in sizes]
    packed = masked_attention(*(torch.cat(x, 2) for x in zip(*parts, strict=True)), [documents], **text)
    for got, part, spec in zip(packed.split(sizes, 2), parts, documents, strict=True):
        assert_equal_but_for_rounding(got, masked_attention(*part, [[spec]], **text), 18)


def test_where_and_score_mod_may_look_things_up():
    spec, (query, key, value) = GNA((3, 4), 3), sequences(14, 15)
    same = torch.rand(2, 4, 14, 15) < 0.5
    bias = torch.randn(2, 4, 14, 15, dtype=torch.float64)
    text = {"prefix": 2, "extra_kv": 1}
    mods = {
        "where": lambda b, h, q, k: same[b, h, q, k],
        "score_mod": lambda s, b, h, q, k: s + bias[b, h, q, k],
    }
    out = masked_attention(query, key, value, [[spec]], **text, **mods)
    mask = dense_mask(spec, **text) & same
    want, _ = plain_attention(query, key, value, mask, score_mod=lambda s, b, h, q, k: s + bias)
    assert_equal_but_for_rounding(out, want, 15)
    none = [x[:0] for x in (query, key, value)]
    nothing = masked_attention(*none, [[spec]], **text, **mods, padding=torch.zeros(0, 2, dtype=torch.int32))
    assert nothing.shape == (0, 4, 14, 3)


def test_sequences_that_do_not_fit_are_refused():
    query, key, value = good = sequences(13, 14)
    one = [[GNA((3, 4), 2)]]
    for inputs, specs_given, options, message in (
        ([query[0], key, value], one, {}, "[batch, heads, tokens, head_dim]: got 3 dimensions"),
        ([query[:, :, 1:], key, value], one, {}, "query must fit the tokens of specs, prefix and suffix"),
        ([query, key[:, :, 1:], value], one, {}, "Give key the shape (2, 2, 14, 5)."),
        ([query, key[0], value], one, {}, "the tokens with extra_kv: got (2, 14, 5)"),
        ([query, key, value[:, :1]], one, {}, "Give value the shape (2, 2, 14, 3)."),
        ([query[:, :3], key, value], one, {}, "multiple of key heads: got 3 and 2"),
        ([query, key, value.half()], one, {}, "share one dtype"),
        (good, one * 3, {}, "one per query head: got 3 for 4 heads"),
        (good, [], {}, "one per query head: got 0 for 4 heads"),
        (good, [[]], {}, "there must be a document: got none"),
        (good, [*one, [GNA(12, 1)]] * 2, {}, "for 4 heads, on 2 kinds of grids"),
        (good, one, {"suffix": -1}, "must be at least 0: got (1, -1, 1)"),
        (good, one, {"padding": torch.ones(2, 3)}, "padding must fit the batch and the tokens: got (2, 3)"),
        (good, one, {"padding": torch.ones(3, 2)}, "Give padding the shape (2, 2)."),
        (
            good,
            one,
            {"text_valid": torch.ones(2)},
            "text_valid must fit the batch and the tokens: got (2, 1)",
        ),
        (good, one, {"text_valid": torch.ones(2, 3)}, "Give text_valid the shape (2, 2)."),
        (sequences(13, 15), [[GNA(5, 1), GNA(6, 1)]], {"padding": torch.ones(2, 1)}, "one document: got 2"),
    ):
        with pytest.raises(GNAError) as refusal:
            masked_attention(*inputs, specs_given, **({"prefix": 1, "extra_kv": 1} | options))
        assert message in str(refusal.value)


# --------------------------------------------------------------------------------------- NATTEN, the peer


@pytest.fixture(scope="module")
def natten():
    return pytest.importorskip("natten", reason="natten is not installed")


def natten_mask(natten, monkeypatch, spec: GNA, queries: torch.Tensor) -> torch.Tensor:
    """Rows of NATTEN's row-major mask: its mask_mod, without the dense block mask it would build."""
    flex = natten.backends.flex
    monkeypatch.setattr(flex, "create_block_mask", lambda mask_mod, **_: mask_mod)
    mask_mod = flex.get_na_flex_mask(
        "cpu", spec.rank, spec.shape, spec.window, spec.stride, spec.dilation, spec.is_causal
    )
    return mask_mod(None, None, queries[:, None], torch.arange(spec.num_tokens)[None, :])


@pytest.mark.peer
def test_masks_are_those_of_natten_bit_for_bit(natten, monkeypatch):
    rng = random.Random(0)
    for base in NATTEN_CASES:
        variants = causal_variants(base)
        for spec in variants if base.num_tokens <= 300 else [base, rng.choice(variants[1:])]:
            few = min(max(2**18 // spec.num_tokens, 2), spec.num_tokens)
            queries = sorted({0, spec.num_tokens - 1, *rng.sample(range(spec.num_tokens), few)})
            theirs = natten_mask(natten, monkeypatch, spec, torch.tensor(queries))
            for query, row in zip(queries, theirs, strict=True):
                assert set(row.nonzero().flatten().tolist()) == allowed_keys(spec, query), (spec, query)


def natten_value_specs() -> list[GNA]:
    """The cases that a CPU does quickly, two that it does not, and every causal combination of a few."""
    rng = random.Random(0)
    quick = [spec for spec in NATTEN_CASES if spec.num_tokens <= 1600]
    slow = [spec for spec in NATTEN_CASES if 1600 < spec.num_tokens <= 4096]
    few = rng.sample([spec for spec in quick if spec.rank > 1 and spec.num_tokens <= 900], 4)
    return [*quick, *rng.sample(slow, 2), *(variant for spec in few for variant in causal_variants(spec)[1:])]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse")
def test_values_are_those_of_natten(natten, monkeypatch):
    """NATTEN computes in float32, and may err twice as much as the plain computation in float32; its
    log-sum-exp comes from base 2, which rounds once more."""
    flex_attention = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    for spec in natten_value_specs():
        query, key, value = tensors(spec, dim=8, heads=2, dtype=torch.float32)
        call = (natten.na1d, natten.na2d, natten.na3d)[spec.rank - 1]
        problem = (spec.window, spec.stride, spec.dilation, spec.is_causal)
        theirs = call(query, key, value, *problem, backend="flex-fna", return_lse=True)
        exact = attend(spec, query.double(), key.double(), value.double(), return_lse=True)
        plain = attend(spec, query, key, value, return_lse=True, compute_dtype=torch.float32)
        once_more = torch.finfo(torch.float32).eps * exact[1].abs().max()
        for got, same_dtype, want, extra in zip(theirs, plain, exact, (0, once_more), strict=True):
            budget = 2 * (same_dtype - want).abs().max() + extra
            assert (got - want).abs().max() <= budget, spec


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse")
def test_extra_keys_are_nattens_additional_keys(natten, monkeypatch):
    """NATTEN attends to them apart and merges: a weight errs by a quarter of what the log-sum-exps err by,
    and the merge rounds a few times more."""
    flex_attention = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    eps, rng = torch.finfo(torch.float32).eps, random.Random(6)
    for spec in rng.sample([spec for spec in NATTEN_CASES if spec.num_tokens <= 900], 12):
        spec = rng.choice(causal_variants(spec))
        query, key, value = tensors(spec, batch=2, dim=8, heads=4, kv_heads=2, dtype=torch.float32)
        extra = {name: x.float() for name, x in extras(7, dim=8).items()}
        call = (natten.na1d, natten.na2d, natten.na3d)[spec.rank - 1]
        problem = (spec.window, spec.stride, spec.dilation, spec.is_causal)
        additional = dict(zip(("additional_keys", "additional_values"), extra.values(), strict=True))
        out, lse = call(query, key, value, *problem, backend="flex-fna", return_lse=True, **additional)
        exact = attend(
            spec, *(x.double() for x in (query, key, value)),
            **{name: x.double() for name, x in extra.items()}, return_lse=True,
        )  # fmt: skip
        plain = attend(spec, query, key, value, **extra, return_lse=True, compute_dtype=torch.float32)
        errors = [(x - y).abs().max() for x, y in zip(plain, exact, strict=True)]
        lse_budget = 2 * errors[1] + 4 * eps * exact[1].abs().max()
        largest = max(x.abs().max() for x in (value, extra["extra_values"]))
        assert (lse - exact[1]).abs().max() <= lse_budget, spec
        assert (out - exact[0]).abs().max() <= 2 * errors[0] + (lse_budget + 4 * eps) * largest, spec
