"""Plain eager calls of the norm and of the loss go to their kernels without an operator's dispatch.

What watches a call (a compiler, a tracer, a transform, a subclass) still sees one operator.
"""

import pytest
import torch
from loss_inputs import inputs_of
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mamba_fast import MambaConfig, MambaLMHeadModel, layer_norm_fn, linear_cross_entropy_fn, rms_norm_fn
from mamba_fast.ops.linear_cross_entropy import chunks
from mamba_fast.ops.linear_cross_entropy.arguments import check_labels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM, LOSS = {"mamba_fast::add_norm"}, {"mamba_fast::linear_cross_entropy"}

pytestmark = pytest.mark.triton


class Operators(TorchDispatchMode):
    """The operators of this package that are dispatched, by name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.names |= {name} if name.startswith("mamba_fast::") else set()
        return function(*args, **(kwargs or {}))


def leaves_of(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]


def rms_norm(x, weight, residual):
    return rms_norm_fn(x, weight, None, residual, prenorm=True, backend="triton")


def layer_norm(x, weight, bias):
    return (layer_norm_fn(x, weight, bias, backend="triton"),)


def loss_of(reduction, room="triton"):
    def loss(hidden_states, weight):
        labels = torch.tensor([3, -100, 0], device=hidden_states.device)
        return (linear_cross_entropy_fn(hidden_states, weight, labels, reduction=reduction, backend=room),)

    return loss


CALLS = {
    "rms_norm": (rms_norm, NORM, [(3, 5), (5,), (3, 5)]),
    "layer_norm": (layer_norm, NORM, [(3, 5), (5,), (5,)]),
    "loss": (loss_of("mean"), LOSS, [(3, 5), (7, 5)]),
    "loss a token": (loss_of("none"), LOSS, [(3, 5), (7, 5)]),
    "loss in torch": (loss_of("mean", "torch"), LOSS, [(3, 5), (7, 5)]),
}


@pytest.fixture(params=CALLS)
def case(request):
    function, operators, shapes = CALLS[request.param]
    return function, operators, leaves_of(*shapes)


def gradients(function, leaves, **options):
    """Of every leaf that needs one; the cotangents depend on the shapes alone."""
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(v.shape, generator=generator).to(v) for v in outputs]
    return torch.autograd.grad(outputs, [v for v in leaves if v.requires_grad], cotangents, **options)


def test_a_plain_call_dispatches_no_operator(case):
    function, _, leaves = case
    with Operators() as seen:
        gradients(function, leaves)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                function(*leaves)
    assert seen.names == set()


def test_nor_does_a_step_of_a_model():
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=20), device=DEVICE)
    with Operators() as seen:
        model.loss(torch.randint(20, (2, 5), device=DEVICE), backend="triton").backward()
    assert seen.names == set()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_subclass_reaches_the_operator(case):
    function, operators, (x, *rest) = case
    with Operators() as seen:
        function(x.detach().as_subclass(type("Sub", (torch.Tensor,), {})), *rest)
    assert seen.names == operators


def test_a_tracer_sees_the_operator(case):
    function, operators, leaves = case
    with torch.no_grad():
        graph = make_fx(function)(*leaves)
    nodes = (getattr(node.target, "_schema", None) for node in graph.graph.nodes)
    assert {s.name for s in nodes if s and s.name.startswith("mamba_fast::")} == operators


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_the_norm_can_be_replayed():
    given = [v.detach() for v in leaves_of((3, 5), (5,), (3, 5))]
    traced = torch.jit.trace(lambda *v: rms_norm(*v)[0], given, check_trace=False)
    others = [v.detach() for v in leaves_of((3, 5), (5,), (3, 5), seed=2)]
    assert torch.equal(traced(*others), rms_norm(*others)[0])


def test_a_transform_reaches_the_operator():
    x, weight, residual = (v.detach() for v in leaves_of((2, 3, 5), (5,), (2, 3, 5)))
    with Operators() as seen, torch.no_grad():
        y, s = torch.vmap(rms_norm, in_dims=(0, None, 0))(x, weight, residual)
    assert seen.names == NORM
    assert all(torch.equal(a, b) for a, b in zip((y, s), rms_norm(x, weight, residual), strict=True))


def test_the_operator_gives_the_same_bits(case):
    """With create_graph its backward is the operator's too; and where one argument alone needs a gradient."""
    function, operators, leaves = case
    want = gradients(function, leaves)
    with Operators() as seen:
        through = gradients(function, leaves, create_graph=True)
    assert seen.names == {f"{name}_backward" for name in operators}
    assert all(torch.equal(a, b) for a, b in zip(through, want, strict=True))
    for i in range(len(leaves)):
        alone = [v.detach().requires_grad_(i == j) for j, v in enumerate(leaves)]
        assert torch.equal(gradients(function, alone)[0], want[i])


def test_a_second_derivative_is_refused_by_name(case):
    function, operators, leaves = case
    first = gradients(function, leaves, create_graph=True)[0]
    name = "rms_norm_fn: the triton backend is" if operators == NORM else "linear_cross_entropy_fn:"
    with pytest.raises(RuntimeError, match=f"{name} differentiable once, and a second derivative"):
        torch.autograd.grad(first.sum(), leaves)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_it_again(case, reentrant):
    function, _, leaves = case
    want = gradients(function, leaves)
    outputs = checkpoint(lambda *given: function(*given), *leaves, use_reentrant=reentrant)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(v.shape, generator=generator).to(v) for v in outputs])
    assert all(torch.equal(v.grad, g) for v, g in zip(leaves, want, strict=True))


def test_two_backwards_add_up_in_memory_of_their_own():
    """x and the residual are given one gradient: neither .grad may change with the other."""
    x, weight, residual = leaves_of((3, 5), (5,), (3, 5))
    y, _ = rms_norm(x, weight, residual)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(x.grad, 2 * dx)


def test_a_sum_changed_in_place_is_noticed():
    """The backward reads it."""
    y, s = rms_norm(*leaves_of((3, 5), (5,), (3, 5)))
    with torch.no_grad():
        s += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("room", ["torch", "triton"])
def test_a_label_out_of_range_is_no_number_in_either_room(room):
    """What a GPU is left with, where nobody looks at labels before; padding is out of range, too."""
    inputs = inputs_of((5,), 4, 9, 2, ignored=0, device=DEVICE)
    labels = torch.tensor([3, 9, 7, -1, -100], device=DEVICE)
    given = (inputs["hidden_states"], inputs["weight"], inputs["bias"], labels, None, torch.float32, 7, -100)
    losses, *grads = chunks.losses_and_gradients(*given, room, [True] * 3)
    assert losses.isnan().tolist() == [False, True, True, True, False]
    assert losses[4] == 0
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("scale", [None, torch.empty(6, device="meta")])
def test_the_host_does_not_wait_for_a_gpu(scale):
    """A tensor on the meta device has no values: to ask for one, as a wait would, is an error."""
    hidden, weight, bias = (torch.empty(n, device="meta") for n in ((6, 5), (7, 5), (7,)))
    labels = torch.empty(6, dtype=torch.int64, device="meta")
    check_labels(labels, 7, -100)
    given = (hidden, weight, bias, labels, scale, torch.float32, 7, -100, "torch", [True] * 3)
    losses, *grads = chunks.losses_and_gradients(*given)
    assert losses.is_meta
    assert [g.shape for g in grads] == [hidden.shape, weight.shape, bias.shape]
