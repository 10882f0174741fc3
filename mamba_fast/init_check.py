"""What a training framework has overwritten of the initialisation, said parameter by parameter."""

import math

import torch
import torch.nn.functional as F

_HERE = {"dtype": torch.float64, "device": "cpu"}
SIGMAS = 6  # how far a random mean or standard deviation may lie from its own: a chance of 2 in 10^9


def check_init(model):
    """What is not as :class:`Mamba` initialised it, one line each; an empty list if nothing was lost.

    For a model that has not been trained. Looks at A_log, D, dt_proj.weight and dt_proj.bias of every
    Mamba block in `model`: their values, their type, and the marks `_no_weight_decay` and `_no_reinit`
    that a framework should respect. `mixer.init_scan_parameters()` sets all four again.
    """
    lines = []
    for name, module in model.named_modules():
        if hasattr(module, "init_scan_parameters"):
            empty = [k for k, p in module.named_parameters() if p.is_meta]
            found = [f"{k}: has no values yet: it is on the meta device" for k in empty]
            found = found or [*_values(module), *_marks(module)]
            lines += [f"{name}.{line}" if name else line for line in found]
    return lines


def _values(mixer):
    states = torch.arange(1, mixer.d_state + 1, **_HERE)
    yield from _constant("A_log", mixer.A_log, torch.log(states), "log(1) .. log(N)")
    yield from _constant("D", mixer.D, torch.ones((), **_HERE), "1 everywhere")
    options = mixer.init_options
    limit = mixer.dt_rank**-0.5 * options["dt_scale"]
    weight = mixer.dt_proj.weight
    if options["dt_init"] == "constant":
        wanted = torch.full((), limit, **_HERE)
        yield from _constant("dt_proj.weight", weight, wanted, f"{limit:.3g} everywhere")
    else:
        yield from _uniform(weight, limit)
    yield from _step_sizes(mixer.dt_proj.bias, options)


def _constant(name, parameter, wanted, words):
    if parameter.dtype != torch.float32 and name in ("A_log", "D"):
        got = str(parameter.dtype).removeprefix("torch.")
        yield f"{name}: expected float32, got {got}: the recurrence needs it"
    x = _exact(parameter)
    room = 4 * torch.finfo(parameter.dtype).eps * wanted.abs().clamp(min=1)
    off = ~((x - wanted).abs() <= room)  # also where x is not a number
    if off.any():
        yield f"{name}: expected {words}, got {_range(x)}; {int(off.sum())} of {off.numel()} values differ"


def _uniform(weight, limit):
    x, count = _exact(weight), weight.numel()
    std = limit / math.sqrt(3)
    got = x.square().mean().sqrt().item()
    room = SIGMAS * std / math.sqrt(5 * count)  # that of the root mean square of a uniform variable
    within = x.abs().max().item() <= limit * (1 + torch.finfo(weight.dtype).eps)
    if not (within and abs(got - std) <= room):
        yield (
            f"dt_proj.weight: expected uniform within ±R^-½ = ±{limit:.3g}, of standard deviation "
            f"{std:.3g} ± {room:.1g}, got {_range(x)} and {got:.3g}"
        )


def _step_sizes(bias, options):
    low, high, floor = (options[k] for k in ("dt_min", "dt_max", "dt_init_floor"))
    wanted = f"softplus of it log-uniform from {max(low, floor):.3g} to {max(high, floor):.3g}"
    dt = F.softplus(_exact(bias))
    eps = max(torch.finfo(bias.dtype).eps, torch.finfo(torch.float32).eps)  # it is found in float32
    room = 4 * eps * _exact(bias).abs().max().clamp(min=1).item()
    inside = (dt >= max(low, floor) * (1 - room)) & (dt <= max(high, floor) * (1 + room))
    if not inside.all():
        zero = ": set to zero, a Linear's usual bias" if not bias.any() else ""
        yield f"dt_proj.bias: expected {wanted}, got {_range(dt)}{zero}"
    elif floor <= low < high:
        span = math.log(high / low)
        middle, mean = math.log(high * low) / 2, dt.log().mean().item()
        if abs(mean - middle) > SIGMAS * span / math.sqrt(12 * len(dt)):
            yield f"dt_proj.bias: expected {wanted}, got a geometric mean of {math.exp(mean):.3g}"


def _marks(mixer):
    marks = (("A_log", mixer.A_log, "_no_weight_decay"), ("D", mixer.D, "_no_weight_decay"),
             ("dt_proj.bias", mixer.dt_proj.bias, "_no_reinit"))  # fmt: skip
    for name, parameter, mark in marks:
        if not getattr(parameter, mark, False):
            yield f"{name}: lost its mark {mark}, which tells a framework to leave it alone"


def _exact(parameter):
    return parameter.detach().cpu().double()


def _range(x):
    low, high = x.min().item(), x.max().item()
    return f"{low:.3g} everywhere" if low == high else f"{low:.3g} to {high:.3g}"
