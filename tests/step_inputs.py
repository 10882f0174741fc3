"""Random arguments of one update of the state, with and without heads."""

import torch


def step_inputs(batch, heads, channels, d_state, groups=1, *, seed=0, tied=False, slots=None, device="cpu"):
    """Keyword arguments of one update, float32, random; `tied`: one Δ and one A a head, by expand."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    head = (heads,) if heads else ()
    one = 1 if tied else channels
    matrix = (batch, groups, d_state) if heads else (batch, d_state)
    dt, bias = normal(batch, *head, one), normal(*head, one).abs() / 2
    A = -normal(*head, one, 1 if tied else d_state).abs() - 0.25
    return dict(
        state=normal(slots or batch, *head, channels, d_state), x=normal(batch, *head, channels),
        dt=dt.expand(batch, *head, channels), A=A.expand(*head, channels, d_state),
        B=normal(*matrix), C=normal(*matrix), D=normal(*head, channels), z=normal(batch, *head, channels),
        dt_bias=bias.expand(*head, channels), dt_softplus=True,
    )  # fmt: skip


def at_types(inputs, state, io):
    """`inputs` with the state in one type and x, dt, B, C, z in another; the parameters stay float32."""
    to = {"state": state} | dict.fromkeys(("x", "dt", "B", "C", "z"), io)
    return {k: v.to(to[k]) if k in to and v is not None else v for k, v in inputs.items()}
