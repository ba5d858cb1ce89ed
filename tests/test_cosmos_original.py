"""Neighborhood attention in NVIDIA's own Cosmos networks, on a small one that is nested and called alike."""

from __future__ import annotations

import contextlib
import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnaflex.models.cosmos_original import CosmosAttention, replace_attention
from gnaflex.models.recipes import Neighborhood
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA, GNAError

GRID, HEADS, HEAD_DIM, TEXT = (4, 6, 8), 2, 12, 5
CHANNELS = HEADS * HEAD_DIM
FORM = {"window": (2, 4, 3), "stride": (1, 2, 1)}


# ---- the stand-in: layouts, call conventions and names of the original, in float64 -------------------


class Op(nn.Module):
    """Transformer Engine's op in the format sbhd; ``visible`` is the oracle's mask."""

    def __init__(self):
        super().__init__()
        self.cp_group, self.visible, self.told, self.extra = None, None, [], torch.zeros(1)

    def forward(
        self, q, k, v, attention_mask=None, *, core_attention_bias_type=None, core_attention_bias=None
    ):
        self.told.append((attention_mask, core_attention_bias_type, core_attention_bias))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible, -torch.inf)
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)

    def set_context_parallel_group(self, group, ranks, stream):
        self.cp_group, self.cp_ranks, self.cp_stream = group, ranks, stream

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def turned(x, angles):
    """Rotary embedding of x [tokens, batch, heads, head_dim] by angles [tokens, 1, 1, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.is_selfattn, self.backend, self.qkv_format = context is None, "transformer_engine", "sbhd"
        widths = CHANNELS, context or CHANNELS, context or CHANNELS
        norms = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM), nn.Identity()
        self.to_q, self.to_k, self.to_v = (
            nn.Sequential(nn.Linear(width, CHANNELS, bias=False), norm)
            for width, norm in zip(widths, norms, strict=True)
        )
        self.to_out = nn.Sequential(nn.Linear(CHANNELS, CHANNELS, bias=False), nn.Dropout(0.0))
        self.attn_op = Op()

    def forward(self, x, context=None, mask=None, rope_emb=None):
        context = x if context is None else context
        pairs = (self.to_q, x), (self.to_k, context), (self.to_v, context)
        q, k, v = (norm(linear(y).unflatten(-1, (HEADS, HEAD_DIM))) for (linear, norm), y in pairs)
        if self.is_selfattn:
            q, k = turned(q, rope_emb), turned(k, rope_emb)
        return self.to_out(
            self.attn_op(q, k, v, core_attention_bias_type="no_bias", core_attention_bias=None)
        )


class VideoAttn(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.attn = Attention(context)

    def forward(self, x, context=None, rope_emb=None):
        return self.attn(x.flatten(0, 2), context, rope_emb=rope_emb).unflatten(0, x.shape[:3])


class Building(nn.Module):
    """One of full attention, cross-attention and MLP under adaptive norm."""

    def __init__(self, kind):
        super().__init__()
        self.block_type = kind
        mlp = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.GELU())
        self.block = {"fa": lambda: VideoAttn(None), "ca": lambda: VideoAttn(7), "mlp": lambda: mlp}[kind]()
        self.norm_state = nn.LayerNorm(CHANNELS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(CHANNELS, 3 * CHANNELS))

    def forward(self, x, time, text, rope, flat):
        shift, scale, gate = self.adaLN_modulation(time).chunk(3, -1)
        y, block = self.norm_state(x) * (1 + scale) + shift, self.block
        if self.block_type == "mlp":
            return x + gate * block(y)
        context = text if self.block_type == "ca" else None
        if flat:  # the training code's blocks that save memory pass by VideoAttn
            return x + gate * block.attn(y.flatten(0, 2), context, rope_emb=rope).unflatten(0, x.shape[:3])
        return x + gate * block(y, context, rope_emb=rope)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Building(kind) for kind in ("fa", "ca", "mlp"))

    def forward(self, x, *rest):
        for block in self.blocks:
            x = block(x, *rest)
        return x


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv3d(3, CHANNELS, (1, 2, 2), (1, 2, 2))

    def forward(self, x):
        return self.proj(x).movedim(1, -1)  # [batch, frames, height, width, channels]


class Net(nn.Module):
    """A video x [batch, 3, T, 2 H, 2 W] to [batch, T, H, W, channels]; ``run`` calls a layer."""

    def __init__(self, layers=3, flat=False):
        super().__init__()
        self.flat, self.run = flat, lambda layer, *args: layer(*args)
        self.x_embedder = Embedder()
        self.blocks = nn.ModuleDict({f"block{at}": Layer() for at in range(layers)})

    def forward(self, x, time, text, hints=None):
        y = self.x_embedder(x).movedim(0, 3)  # [frames, height, width, batch, channels]
        place = torch.stack(torch.meshgrid(*map(torch.arange, y.shape[:3]), indexing="ij"), -1).flatten(0, 2)
        rope = (place[:, :, None] * torch.tensor([1.0, 0.3]).to(x)).flatten(1)[:, None, None]
        for name, layer in self.blocks.items():
            y = self.run(layer, y, time, text.movedim(0, 1), rope, self.flat)
            if hints and name in hints:
                y = y + hints[name]
        return y.movedim(3, 0)


class Control(Net):
    """Its layers make hints for a base network, whose ``forward`` it calls past its hooks."""

    def forward(self, x, time, text, base):
        hints = super().forward(x, time, text).movedim(0, 3)
        return base.net.forward(x=x, time=time, text=text, hints={"block0": hints})


def seeded(net):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net.double()


@pytest.fixture
def net():
    return seeded(Net())


def inputs(grid=GRID, batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 3, grid[0], 2 * grid[1], 2 * grid[2]), (batch, CHANNELS), (batch, TEXT, 7)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def self_attentions(net):
    return [one for one in net.modules() if getattr(one, "is_selfattn", False)]


@contextlib.contextmanager
def masked(net, *specs):
    """The oracle: dense attention under a boolean mask; one spec for all layers, or one per layer or None."""
    ops = [attn.attn_op for attn in self_attentions(net)]
    for op, spec in zip(ops, specs * (len(ops) // len(specs)), strict=True):
        op.visible = None if spec is None else dense_mask(spec)
    yield
    for op in ops:
        op.visible = None


def oracle(net, args, *specs):
    with masked(net, *specs):
        return net(*args)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-10)


# ---- a whole network ---------------------------------------------------------------------------------


def test_a_window_of_the_whole_grid_changes_nothing(net):
    dense = net(*inputs())
    with replace_attention(net, -1) as swap:
        assert close(net(*inputs()), dense)
    assert len(swap.ops) == 3
    assert not swap.fallbacks


@pytest.mark.parametrize(
    "form",
    [
        {"window": (2, 4, 3)},
        {"window": (2, 4, 4), "stride": (2, 4, 2)},
        {"window": (-1, 2, 4), "dilation": (1, "max", 2)},
        {"window": [1, 3, 8], "dilation": "max"},
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_it_is_attention_under_the_mask(form, flat):
    net, args = seeded(Net(flat=flat)), inputs()
    wanted = oracle(net, args, GNA(GRID, **form))
    assert not close(wanted, net(*args))
    with replace_attention(net, **form) as swap:
        assert close(net(*args), wanted)
    assert not swap.fallbacks


def gradients(net, outs):
    net.zero_grad()
    sum(out.square().mean() for out in outs).backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_gradients(net):
    wanted = gradients(net, [oracle(net, inputs(), GNA(GRID, **FORM))])
    with replace_attention(net, **FORM):
        found = gradients(net, [net(*inputs())])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_blocks_again_on_their_own_grid(net, reentrant):
    """Two videos of as many tokens, one turned, before the backward of both."""
    grids = GRID, (4, 8, 6)
    both = [inputs(grid) for grid in grids]
    pairs = zip(both, grids, strict=True)
    wanted = gradients(net, [oracle(net, args, GNA(grid, **FORM)) for args, grid in pairs])
    net.run = lambda layer, *args: checkpoint(layer, *args, use_reentrant=reentrant)
    with replace_attention(net, **FORM):
        found = gradients(net, [net(*args) for args in both])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("flat", [False, True])
def test_a_control_network_and_its_base(flat):
    """The base network is called by its ``forward``, past hooks of its own."""
    model = nn.ModuleDict({"net": Control(1, flat), "base_model": nn.ModuleDict({"net": Net(2, flat)})})
    control, base = seeded(model)["net"], model["base_model"]
    args = (*inputs(), base)
    with masked(model, GNA(GRID, **FORM)):
        wanted = control(*args)
    with masked(base, GNA(GRID, **FORM)):
        wanted_of_base = control(*args)
    with replace_attention(model, **FORM) as swap:
        assert close(control(*args), wanted)
    assert list(swap.ops) == [
        f"{net}.blocks.block{at}.blocks.0.block.attn"
        for net, at in (("net", 0), ("base_model.net", 0), ("base_model.net", 1))
    ]
    with replace_attention(base.net, **FORM) as swap:
        assert close(control(*args), wanted_of_base)
    assert not swap.fallbacks


def test_several_views_are_an_axis_of_their_own(net):
    net.n_views = 2
    wanted = oracle(net, inputs(), GNA((2, 2, 6, 8), (2, 1, 4, 3)))
    with replace_attention(net, (-1, 1, 4, 3)):
        assert close(net(*inputs()), wanted)
    with replace_attention(net, (1, 4, 3)), pytest.raises(GNAError, match="one entry per axis"):
        net(*inputs())


def test_sequence_parallelism_leaves_the_grid_of_the_embedder(net):
    """The training code then gives blocks [tokens of a rank, 1, 1, batch, channels]."""
    flattened = lambda layer, y, *rest: layer(y.flatten(0, 2)[:, None, None], *rest).flatten(0, 2)  # noqa: E731
    net.run = lambda layer, y, *rest: flattened(layer, y, *rest).unflatten(0, GRID)
    wanted = oracle(net, inputs(), GNA(GRID, **FORM))
    with replace_attention(net, **FORM):
        assert close(net(*inputs()), wanted)


def test_a_single_block_tells_the_grid_and_flat_tokens_do_not(net):
    video, rope = net.blocks["block0"].blocks[0].block, torch.zeros(192, 1, 1, HEAD_DIM // 2)
    y = torch.randn(*GRID, 2, CHANNELS).double()
    with masked(video, GNA(GRID, **FORM)):
        wanted = video(x=y, rope_emb=rope)
    with replace_attention(video, **FORM):
        assert close(video(x=y, rope_emb=rope), wanted)
    with replace_attention(video.attn, **FORM) as swap:
        video(y, rope_emb=rope)
    assert ["no token grid" in reason for reason in swap.fallbacks] == [True]


def test_layers_of_their_own(net):
    default, other = GNA(GRID, **FORM), GNA(GRID, (4, 2, 2), (1, 2, 1))
    wanted = oracle(net, inputs(), None, default, other)
    for last in ({"window": [4, 2, 2]}, Neighborhood((4, 2, 2), (1, 2, 1))):
        with replace_attention(net, **FORM, layers={0: None, -1: last}) as swap:
            assert close(net(*inputs()), wanted)
        assert len(swap.ops) == 2


def test_layers_that_are_refused(net):
    with pytest.raises(GNAError, match="got 3, it has 3"):
        replace_attention(net, 2, layers={3: None})
    with pytest.raises(GNAError, match="windw"):
        replace_attention(net, 2, layers={0: {"windw": 3}})


def test_a_neighborhood_scales_with_the_grid(net):
    near = Neighborhood((8, 8, 6), (2, 4, 2), base=(8, 12, 16))
    wanted = oracle(net, inputs(), GNA(GRID, (4, 4, 3), (1, 2, 1)))
    with replace_attention(net, near):
        assert close(net(*inputs()), wanted)


@pytest.mark.parametrize("grid", [(4, 8, 6), lambda: (4, 8, 6)])
def test_a_grid_that_is_given_holds(net, grid):
    wanted = oracle(net, inputs(), GNA((4, 8, 6), **FORM))
    with replace_attention(net, **FORM, grid=grid):
        assert close(net(*inputs()), wanted)


def test_the_backend_is_the_one_asked_for(net):
    with replace_attention(net, **FORM, backend="flash"), pytest.raises(NotImplementedError):
        net(*inputs())


# ---- in and out --------------------------------------------------------------------------------------


def places(net):
    """All that a module holds, hooks as well, without the op's memory of its calls."""
    return {
        name: {key: copy.copy(value) for key, value in module.__dict__.items() if key != "told"}
        for name, module in net.named_modules()
    }


def test_removing_restores_all(net):
    before, dense = places(net), net(*inputs())
    swap = replace_attention(net, **FORM)
    sparse = net(*inputs())
    assert places(net) != before
    swap.remove()
    assert places(net) == before
    assert torch.equal(net(*inputs()), dense)
    swap.remove()
    with contextlib.suppress(ZeroDivisionError), replace_attention(net, **FORM):
        assert torch.equal(net(*inputs()), sparse)
        raise ZeroDivisionError
    assert places(net) == before


def test_a_plain_function_comes_back_unless_it_was_given_away(net):
    attn, op = self_attentions(net)[0], Op()
    del attn.attn_op
    attn.attn_op = op.forward
    replace_attention(net, **FORM).remove()
    assert attn.attn_op == op.forward
    swap = replace_attention(net, **FORM)
    attn.attn_op = len
    swap.remove()
    assert attn.attn_op is len


def test_an_op_that_was_set_since_stays(net):
    attn, mine = self_attentions(net)[0], Op()
    swap = replace_attention(net, **FORM)
    attn.attn_op = mine
    swap.remove()
    assert attn.attn_op is mine


def test_states_do_not_see_it(net):
    def keys():
        return [*net.state_dict()], [name for name, _ in net.named_modules()]

    before = keys()
    assert any(key.endswith("attn_op._extra_state") for key in before[0])
    with replace_attention(net, **FORM):
        assert keys() == before
        net.load_state_dict({**net.state_dict(), "blocks.block0.blocks.0.block.attn.attn_op._extra_state": 7})
        net.float()
        assert net(*(x.float() for x in inputs())).dtype == torch.float32
    assert self_attentions(net)[0].attn_op.extra == 7
    assert not CosmosAttention(2, dense=Op()).state_dict()


def test_a_copy_reads_its_own_grid(net):
    with replace_attention(net, **FORM):
        copied, args = copy.deepcopy(net), inputs((4, 8, 6))
        net(*inputs())
        found = copied(*args)
    assert close(found, oracle(net, args, GNA((4, 8, 6), **FORM)))


def test_torch_compile_makes_one_graph(net):
    wanted = oracle(net, inputs(), GNA(GRID, **FORM))
    with replace_attention(net, **FORM), torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert close(compiled(*inputs()), wanted)


def test_what_is_no_such_network_is_refused(net):
    with pytest.raises(GNAError, match="Linear has none"):
        replace_attention(nn.Linear(2, 2), 2)
    with replace_attention(net, 2), pytest.raises(GNAError, match=r"swap\.remove\(\)"):
        replace_attention(net, 2)
    attn, before = self_attentions(net)[1], places(net)
    for field, value in (("backend", "torch"), ("qkv_format", "bshd")):
        right = getattr(attn, field)
        setattr(attn, field, value)
        with pytest.raises(GNAError, match=f"{field}={right!r}"):
            replace_attention(net, 2)
        setattr(attn, field, right)
    assert places(net) == before


# ---- calls that stay dense ---------------------------------------------------------------------------


class Group:
    """A process group."""

    def __init__(self, ranks):
        self.size = lambda: ranks


def of_ranks(ranks):
    op = Op()
    op.cp_group = Group(ranks)
    return op


def tokens(count, keys=None):
    query, more = (torch.randn(2, one, 2, HEADS, HEAD_DIM).double() for one in (count, keys or count))
    return query[0], *more


@pytest.mark.parametrize(
    ("form", "qkv", "dense", "reason"),
    [
        ({"window": 2, "grid": GRID}, tokens(192, TEXT), Op(), "cross-attention, of 192 queries and 5 keys"),
        ({"window": 2, "grid": GRID}, tokens(48), Op(), "48 tokens, the grid 4x6x8 has 192"),
        ({"window": 2}, tokens(192), Op(), "no token grid"),
        ({"window": 2, "grid": lambda: None}, tokens(192), Op(), "no token grid"),
        ({"window": 2, "grid": lambda: (1, 6, 8)}, tokens(48), Op(), "2 tokens of axis 0, which has 1"),
        ({"window": 2, "grid": GRID}, tokens(192), of_ranks(2), "each of 2 ranks a part"),
    ],
)
def test_the_original_takes_what_is_no_grid_and_says_why_once(form, qkv, dense, reason, caplog):
    op, bias = CosmosAttention(**form, dense=dense), {"core_attention_bias": "of the caller"}
    with caplog.at_level(logging.WARNING, "gnaflex"):
        for _ in range(2):
            assert torch.equal(op(*qkv, "mask", **bias), dense(*qkv))
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert [reason in one for one in op.reasons] == [True]
    assert dense.told[0] == ("mask", None, "of the caller")


def test_without_the_original_it_refuses():
    op = CosmosAttention(2, grid=GRID)
    with pytest.raises(GNAError, match="5 keys"):
        op(*tokens(192, TEXT))
    with pytest.raises(GNAError, match="dense="):
        op.set_context_parallel_group(None, [0], None)
    with pytest.raises(GNAError, match="window"):
        CosmosAttention(5, grid=list(GRID))


def test_layers_log_a_reason_once(net, caplog):
    args = inputs((1, 6, 8))
    wanted = net(*args)
    with replace_attention(net, **FORM) as swap, caplog.at_level(logging.WARNING, "gnaflex"):
        assert torch.equal(net(*args), wanted)
        assert not close(net(*inputs()), wanted[:, :1])
    assert len(caplog.records) == len(swap.fallbacks) == 1


def test_context_parallelism_is_the_originals(net):
    """As GeneralDIT turns it on and off, from outside."""
    dense, sparse = net(*inputs()), oracle(net, inputs(), GNA(GRID, **FORM))
    originals = [attn.attn_op for attn in self_attentions(net)]
    with replace_attention(net, **FORM) as swap:
        for ranks, wanted in ((2, dense), (1, sparse)):
            for attn in self_attentions(net):
                attn.attn_op.set_context_parallel_group(Group(ranks), [0, 1], "stream")
            assert close(net(*inputs()), wanted)
        assert len(swap.fallbacks) == 1
        assert {op.cp_stream for op in originals} == {"stream"}
        for attn in self_attentions(net):
            attn.attn_op.cp_group = attn.attn_op.cp_ranks = attn.attn_op.cp_stream = None
        assert close(net(*inputs()), sparse)
    assert {(op.cp_group, op.cp_ranks, op.cp_stream) for op in originals} == {(None, None, None)}


def test_options_that_change_nothing_pass_and_others_do_not():
    op, qkv = CosmosAttention(**FORM, grid=GRID), tokens(192)
    plain = op(*qkv)
    neutral = {"core_attention_bias_type": "no_bias", "attn_mask_type": "no_mask", "qkv_format": "sbhd"}
    assert torch.equal(op(*qkv, None, core_attention_bias=None, fp8_output=False, **neutral), plain)
    assert torch.equal(op(*qkv, core_attention_bias_type=None), plain)
    for name, value in (
        ("core_attention_bias", torch.ones(1)),
        ("core_attention_bias_type", "alibi"),
        ("attn_mask_type", "causal"),
        ("qkv_format", "bshd"),
        ("alibi_slopes", 3.0),
    ):
        with pytest.raises(GNAError, match=f"got {name} = "):
            op(*qkv, **{name: value})
    with pytest.raises(GNAError, match="argument 4 = 'a tensor'"):
        op(*qkv, torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_output_is_laid_out_as_the_originals(dtype):
    op, qkv = CosmosAttention(-1, grid=GRID, backend="sdpa"), [x.to(dtype) for x in tokens(192)]
    found, wanted = op(*qkv), Op()(*qkv)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
