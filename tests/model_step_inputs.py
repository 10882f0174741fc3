"""Small models for the step of a whole model, and the comparison of a step with the same one op by op."""

import torch

from mamba_fast.ops.model_step import LayerWeights, Weights, torch_step
from mamba_ref.checks import bounds, check

KINDS = ("conv_state", "ssm_state")


def model_of(sizes, seed=0, conv_bias=True):
    """Weights whose every tensor changes the logits, in float32."""
    layer_count, d_model, d_inner, dt_rank, d_state, width, vocab = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    layers = tuple(
        LayerWeights(
            1 + draw(d_model, scale=0.3), draw(2 * d_inner, d_model, scale=d_model**-0.5),
            draw(d_inner, width, scale=0.5), draw(d_inner) if conv_bias else None,
            draw(dt_rank + 2 * d_state, d_inner, scale=2 * d_inner**-0.5), draw(d_inner, dt_rank, scale=0.3),
            draw(d_inner), draw(d_inner, d_state), draw(d_inner), draw(d_model, d_inner, scale=d_inner**-0.5),
        )
        for _ in range(layer_count)
    )  # fmt: skip
    head = draw(vocab, d_model, scale=d_model**-0.5)
    return Weights(layers, draw(vocab, d_model), 1 + draw(d_model, scale=0.3), head, 1e-5)


def states_of(weights, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            torch.randn(batch, len(x.D), n, generator=generator) for n in (x.conv.shape[1], x.A_log.shape[1])
        )
        for x in weights.layers
    ]


def at(weights, dtype, device="cpu", single=torch.float32):
    """The same numbers in another type; A_log and D in `single`."""
    rows = [
        LayerWeights(*(v if v is None else v.to(device, dtype) for v in x))._replace(
            A_log=x.A_log.to(device, single), D=x.D.to(device, single)
        )
        for x in weights.layers
    ]
    rest = (v.to(device, dtype) for v in weights[1:4])
    return Weights(tuple(rows), *rest, weights.eps)


def outcome(step, weights, tokens, states):
    """Named results of two steps, the second from what the first left."""
    named = {}
    for turn in range(2):
        logits = step(weights, tokens.roll(turn), states)
        named[f"logits {turn}"] = logits
    return named | {
        f"{kind} {i}": v for i, pair in enumerate(states) for kind, v in zip(KINDS, pair, strict=True)
    }


def check_step(step, obstacle, sizes, batch, dtype, device, states_type=None, **options):
    """`step` against torch_step in float64, within the error of torch_step at this precision."""
    weights, states_type = at(model_of(sizes, **options), dtype), states_type or dtype
    tokens = torch.arange(batch) * 7 % sizes[-1]
    first = [tuple(v.to(states_type) for v in pair) for pair in states_of(weights, batch)]
    assert obstacle(weights, tokens, first) is None

    def run(step, where, weights, types):
        states = [tuple(v.clone().to(where, types) for v in pair) for pair in first]
        return outcome(step, weights, tokens.to(where), states)

    wide = at(weights, torch.float64, single=torch.float64)
    truth = run(torch_step.step, "cpu", wide, torch.float64)
    plain = run(torch_step.step, "cpu", weights, states_type)
    got = run(step, device, at(weights, dtype, device), states_type)
    for name, limit in bounds(plain, truth).items():
        check(f"{name}, {sizes}", got[name], truth[name], limit)
