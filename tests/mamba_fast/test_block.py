"""The block and its residual layer: published signatures, names and arithmetic."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_fast
from mamba_fast import Block, InferenceParams, Mamba, RMSNorm
from mamba_fast.block import GatedMLP
from mamba_ref import MambaBlock
from mamba_ref.checks import bound, check

PUBLISHED = {  # class or function: its parameters in order, with their defaults
    Mamba: dict(
        d_model=..., d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=0.001, dt_max=0.1,
        dt_init="random", dt_scale=1.0, dt_init_floor=1e-4, conv_bias=True, bias=False, use_fast_path=True,
        layer_idx=None, device=None, dtype=None,
    ),
    Mamba.forward: dict(self=..., hidden_states=..., inference_params=None),
    Mamba.step: dict(self=..., hidden_states=..., conv_state=..., ssm_state=...),
    Mamba.allocate_inference_cache: dict(self=..., batch_size=..., max_seqlen=..., dtype=None, kwargs=...),
    Block: dict(
        dim=..., mixer_cls=..., mlp_cls=nn.Identity, norm_cls=nn.LayerNorm, fused_add_norm=False,
        residual_in_fp32=False,
    ),
    Block.forward: dict(self=..., hidden_states=..., residual=None, inference_params=None, mixer_kwargs=...),
    InferenceParams: dict(
        max_seqlen=..., max_batch_size=..., seqlen_offset=0, batch_size_offset=0, key_value_memory_dict=...,
        lengths_per_sample=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda f: f.__qualname__)
def test_published_signature(function):
    """Positional parameters are the published ones; what is new comes by keyword alone."""
    parameters = inspect.signature(function).parameters.values()
    old = {p.name: p.default for p in parameters if p.kind is not p.KEYWORD_ONLY}
    assert list(old) == list(PUBLISHED[function])
    for name, default in PUBLISHED[function].items():
        assert default is ... or old[name] == default, name


def test_the_published_example_runs():
    torch.manual_seed(0)
    batch, length, dim = 2, 64, 16
    x = torch.randn(batch, length, dim)
    model = Mamba(
        d_model=dim,
        d_state=16,
        d_conv=4,
        expand=2,
    )
    y = model(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert y.std() > 0


def test_published_names_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in Mamba(10, d_state=5, d_conv=3, bias=True).state_dict().items()}
    assert shapes == {
        "A_log": (20, 5), "D": (20,), "in_proj.weight": (40, 10), "in_proj.bias": (40,),
        "conv1d.weight": (20, 1, 3), "conv1d.bias": (20,), "x_proj.weight": (11, 20),
        "dt_proj.weight": (20, 1), "dt_proj.bias": (20,),
        "out_proj.weight": (10, 20), "out_proj.bias": (10,),
    }  # fmt: skip
    assert "conv1d.bias" not in dict(Mamba(10, conv_bias=False).named_parameters())


@pytest.mark.parametrize("d_model, rank", [(1, 1), (16, 1), (17, 2), (768, 48)])
def test_the_rank_of_delta(d_model, rank):
    assert Mamba(d_model, device="meta").dt_rank == rank
    assert Mamba(d_model, dt_rank=7, device="meta").dt_proj.weight.shape == (2 * d_model, 7)


@pytest.mark.parametrize("seqlen", [1, 2, 64, 65])
@pytest.mark.parametrize("use_fast_path", [True, False])
def test_out_is_that_of_the_reference(seqlen, use_fast_path):
    torch.manual_seed(seqlen)
    reference = MambaBlock(6, d_state=3, d_conv=3, dt_max=1)
    block = Mamba(6, d_state=3, d_conv=3, use_fast_path=use_fast_path)
    block.load_state_dict(reference.state_dict())
    x = torch.randn(2, seqlen, 6)
    plain, want = reference(x), reference.double()(x.double())
    check("out", block(x), want, bound(plain, want))


@pytest.mark.parametrize("use_fast_path", [True, False])
def test_biases_of_the_projections(use_fast_path):
    """A projection with a bias is one of a wider input whose last entry is 1."""
    torch.manual_seed(1)
    block = Mamba(6, d_state=3, bias=True, use_fast_path=use_fast_path)
    plain = Mamba(6, d_state=3, use_fast_path=use_fast_path)
    with torch.no_grad():
        block.in_proj.bias.normal_()
        block.out_proj.bias.normal_()
        plain.load_state_dict(
            {k: v for k, v in block.state_dict().items() if not k.endswith("_proj.bias") or "dt" in k}
        )
        plain.in_proj = nn.Linear(7, 24, bias=False)
        plain.in_proj.weight.copy_(torch.cat([block.in_proj.weight, block.in_proj.bias[:, None]], 1))
    for seqlen in (5, 70):
        x = torch.randn(2, seqlen, 6)
        want = plain(F.pad(x, (0, 1), value=1.0)) + block.out_proj.bias
        check("out", block(x), want, 2.0**-20)
        states = block.allocate_inference_cache(2, 0)
        check("pieces", block.step(x, *states)[0], want, 2.0**-20)


def test_a_projection_put_in_by_a_library_is_called():
    """An adapter that wraps a Linear changes the result: its own forward is used, not its weight."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(2)
    x = torch.randn(2, 5, 6)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        block, want = Mamba(6), Mamba(6)
        want.load_state_dict(block.state_dict())
        layer = getattr(block, name)
        wrapped = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
        wrapped.weight, wrapped.bias = layer.weight, layer.bias
        setattr(block, name, wrapped)
        for p in getattr(want, name).parameters():
            p.data *= 2
        check(name, block(x), want(x), 2.0**-20)
        states = block.allocate_inference_cache(2, 0)
        steps = [block.step(x[:, t : t + 1], *states)[0] for t in range(5)]
        check(f"{name}, steps", torch.cat(steps, 1), want(x), 2.0**-20)


def test_a_block_can_be_taken_apart():
    """By its published attributes, as code does that watches a block or has a forward of its own."""
    torch.manual_seed(3)
    block, x = Mamba(6, d_state=3), torch.randn(2, 5, 6)
    u, z = block.in_proj(x).mT.chunk(2, dim=1)
    u = block.act(block.conv1d(u)[..., :5]).mT
    dt, B, C = block.x_proj(u).split([block.dt_rank, block.d_state, block.d_state], -1)
    delta = F.softplus(block.dt_proj(dt))
    h, out = torch.zeros(2, block.d_inner, block.d_state), []
    for t in range(5):
        decay = torch.exp(-delta[:, t, :, None] * block.A_log.exp())
        h = decay * h + (delta * u)[:, t, :, None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1) + block.D * u[:, t])
    check("out", block.out_proj(torch.stack(out, 1) * block.act(z.mT)), block(x), 2.0**-18)
    assert block.activation == "silu"


@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_adds_then_norms_then_mixes(norm_cls, fused):
    torch.manual_seed(3)
    block = Block(6, Mamba, nn.Identity, norm_cls, fused_add_norm=fused, residual_in_fp32=True)
    x, residual = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    for before in (None, residual):
        total = x if before is None else x + before
        eps = block.norm.eps
        normed = (
            F.rms_norm(total, (6,), eps=eps) if norm_cls is RMSNorm else F.layer_norm(total, (6,), eps=eps)
        )
        out, after = block(x, before)
        check("residual", after, total, 0)
        check("out", out, block.mixer(normed), 2.0**-20)


@pytest.mark.parametrize("fused", [True, False])
def test_the_residual_is_float32_where_asked(fused):
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    for asked, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        block = Block(
            8, lambda dim: Mamba(dim, dtype=torch.bfloat16), nn.Identity,
            lambda dim: RMSNorm(dim, dtype=torch.bfloat16), fused, asked,
        )  # fmt: skip
        out, residual = block(x)
        assert (out.dtype, residual.dtype) == (torch.bfloat16, dtype)
        assert block(out, residual)[1].dtype == dtype


def test_a_layer_with_an_mlp():
    torch.manual_seed(4)
    block = Block(6, Mamba, lambda dim: GatedMLP(dim, 20), RMSNorm, fused_add_norm=True)
    assert block.mlp.fc1.weight.shape == (256, 6)  # 20 rounded up to 128, twice
    x = torch.randn(2, 5, 6)
    mixed = block.mixer(F.rms_norm(x, (6,), eps=1e-5))
    normed = F.rms_norm(x + mixed, (6,), eps=1e-5)
    a, gate = F.linear(normed, block.mlp.fc1.weight).chunk(2, -1)
    out, residual = block(x)
    check("residual", residual, x + mixed, 2.0**-20)
    check("out", out, F.linear(a * F.silu(gate), block.mlp.fc2.weight), 2.0**-20)


def test_an_unknown_norm_is_refused():
    with pytest.raises(TypeError, match="norm_cls: fused_add_norm takes LayerNorm and RMSNorm, got Identity"):
        Block(6, Mamba, nn.Identity, lambda dim: nn.Identity(), fused_add_norm=True)


@pytest.mark.parametrize("options", [dict(d_conv=1), dict(d_conv=5), dict(dt_init="zero")], ids=str)
def test_a_wrong_option_is_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        Mamba(6, **options)


def test_every_public_name_exists():
    assert [name for name in mamba_fast.__all__ if not hasattr(mamba_fast, name)] == []
