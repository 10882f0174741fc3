"""Initial values, the marks on them, and what check_init says of a framework that overwrote them."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_fast import Mamba, MambaConfig, MambaLMHeadModel, check_init, param_groups
from mamba_ref.checks import check

CONFIG = MambaConfig(d_model=64, n_layer=4, vocab_size=500)


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return MambaLMHeadModel(CONFIG, **options)


def mixers(model):
    return [layer.mixer for layer in model.backbone.layers]


@pytest.mark.parametrize(
    "options", [{}, dict(dt_min=0.01, dt_max=0.5, dt_scale=2.0)], ids=["default", "given"]
)
def test_initial_values_of_the_scan(options):
    torch.manual_seed(1)
    block = Mamba(512, d_state=5, **options)
    check("A", -torch.exp(block.A_log), -torch.arange(1.0, 6).expand(1024, 5), 2.0**-22)
    check("D", block.D, torch.ones(1024), 0)
    limit = 32**-0.5 * options.get("dt_scale", 1.0)
    assert 0.99 * limit < block.dt_proj.weight.abs().max() <= limit
    low, high = options.get("dt_min", 0.001), options.get("dt_max", 0.1)
    place = (F.softplus(block.dt_proj.bias.double()).log() - math.log(low)) / math.log(
        high / low
    )  # in [0, 1]
    assert -1e-4 < place.min() < 0.01
    assert 0.99 < place.max() < 1 + 1e-4
    error = 4 / (12 * 1024) ** 0.5  # four standard errors of the mean of a uniform variable
    assert place.mean().item() == pytest.approx(0.5, abs=error)


def test_constant_dt_and_its_floor():
    block = Mamba(64, dt_init="constant", dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3)
    check("weight", block.dt_proj.weight, torch.full((128, 4), 0.5), 0)
    check("step sizes", F.softplus(block.dt_proj.bias.double()), torch.full((128,), 1e-3), 2.0**-18)
    assert check_init(block) == []
    assert check_init(Mamba(8, dt_rank=1, dt_min=1e-6, dt_max=1e-5, dtype=torch.float64)) == []  # all floor


def test_initial_values_of_the_model():
    model = new_model(2)
    weight = model.backbone.embedding.weight
    assert weight.std().item() == pytest.approx(0.02, rel=4 / (2 * weight.numel()) ** 0.5)
    limit = 128**-0.5 / 4**0.5  # the default range of a Linear with 128 inputs, over the root of n_layer
    for mixer in mixers(model):
        assert 0.99 * limit < mixer.out_proj.weight.abs().max() <= limit * (1 + 2.0**-22)


def test_a_second_initialisation_respects_the_marks():
    """What a framework does that zeroes the bias of every Linear but asks for `_no_reinit`."""
    model = new_model(3)
    before = [mixer.dt_proj.bias.clone() for mixer in mixers(model)]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            if not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
    for mixer, bias in zip(mixers(model), before, strict=True):
        assert torch.equal(mixer.dt_proj.bias, bias)
        assert bias.any()
        assert mixer.A_log._no_weight_decay
        assert mixer.D._no_weight_decay


def assigned(model):
    other = MambaLMHeadModel(CONFIG, device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), assigned])
def test_the_marks_survive(again):
    """A copy, as one of averaged weights, and what was loaded in place of the parameters have them too."""
    assert check_init(again(new_model(3))) == []


def test_parameter_groups():
    model = new_model(4)
    model.backbone.norm_f.weight.requires_grad_(False)
    decayed, kept = param_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        {names[id(p)].split(".")[-2:][0] + "." + names[id(p)].split(".")[-1] for p in g["params"]}
        for g in (decayed, kept)
    ]
    assert found[0] == {
        "embedding.weight", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight",
        "out_proj.weight",
    }  # fmt: skip
    assert found[1] == {"mixer.A_log", "mixer.D", "conv1d.bias", "dt_proj.bias", "norm.weight"}
    both = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert len(both) == len(set(both)) == sum(p.requires_grad for p in model.parameters())


def test_parameter_groups_do_not_need_the_marks():
    """A copy of a model, or one built on the meta device, may have lost them."""
    model = new_model(5)
    for p in model.parameters():
        p.__dict__.clear()
    assert len(param_groups(model, 0.1)[1]["params"]) == 4 * 5 + 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_model_has_lost_nothing(seed, dtype):
    assert check_init(new_model(seed, dtype=dtype)) == []


def zero_biases(model):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def small_normal(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


def default_linear(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def normal_everywhere(model):
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)


@pytest.mark.parametrize(
    "overwrite, found",
    [
        (zero_biases, {"dt_proj.bias: expected softplus of it log-uniform from 0.001 to 0.1, got 0.693 "
                       "everywhere: set to zero, a Linear's usual bias"}),
        (small_normal, {"dt_proj.weight: expected uniform within ±R^-½ = ±0.5, of standard deviation"}),
        (default_linear, {"dt_proj.bias: expected softplus of it log-uniform from 0.001 to 0.1, got 0.4"}),
        (normal_everywhere, {"A_log: expected log(1) .. log(N), got", "D: expected 1 everywhere, got",
                             "dt_proj.weight: expected", "dt_proj.bias: expected"}),
        (lambda model: model.half(), {"A_log: expected float32, got float16",
                                      "D: expected float32, got float16"}),
    ],
    ids=["zeros", "normal", "default", "everything", "half"],
)  # fmt: skip
def test_what_was_lost_is_said(overwrite, found):
    model = new_model(6)
    with torch.no_grad():
        overwrite(model)
    lines = check_init(model)
    assert len(lines) == len(found) * 4
    for i in range(4):
        name = f"backbone.layers.{i}.mixer."
        for start in found:
            assert sum(line.startswith(name + start) for line in lines) == 1, lines


@pytest.mark.parametrize("name", ["A_log", "D", "dt_proj.weight", "dt_proj.bias"])
def test_one_value_among_many_is_seen(name):
    block = Mamba(64)
    assert check_init(block) == []
    block.get_parameter(name).data.flatten()[7] = 9.5
    (line,) = check_init(block)
    assert line.startswith(f"{name}: expected")
    assert "9.5" in line


def test_step_sizes_of_another_range_are_seen():
    """Inside the range, and not spread over it."""
    block = Mamba(64)
    with torch.no_grad():
        block.dt_proj.bias.fill_(math.log(math.expm1(0.05)))
    (line,) = check_init(block)
    assert "got a geometric mean of 0.05" in line


def test_lost_marks_are_said():
    block = Mamba(8)
    for p in block.parameters():
        p.__dict__.clear()
    assert [line.split(",")[0] for line in check_init(block)] == [
        "A_log: lost its mark _no_weight_decay",
        "D: lost its mark _no_weight_decay",
        "dt_proj.bias: lost its mark _no_reinit",
    ]


def test_what_was_lost_comes_back():
    model = new_model(7)
    normal_everywhere(model)
    assert check_init(model)
    for mixer in mixers(model):
        mixer.init_scan_parameters()
    assert check_init(model) == []


def test_a_model_without_values_is_said():
    lines = check_init(Mamba(8, device="meta"))
    assert lines[0] == "A_log: has no values yet: it is on the meta device"
