"""A step as one CUDA graph is the eager step."""

import pytest
import torch
from train_inputs import tiny

from mamba_fast.train import Run
from mamba_fast.train.graph import GraphedStep
from mamba_fast.train.run import repeatable
from mamba_ref.checks import bounds, check

STEPS = 12


def trained(folder, task, graph, backend, dtype, first=0):
    """Losses of each step and the parameters after STEPS of them."""
    settings = dict(
        task=task, graph=graph, backend=backend, dtype=dtype, device="cuda", seqlen=64,
        accumulate=2, steps=STEPS, schedule="cosine", warmup=4, clip=0.5,
    )  # fmt: skip
    run, losses = Run(tiny(folder, **settings)), []
    for k in range(STEPS):
        if k == first:  # a run that is taken up has states of the optimizer already
            advance = GraphedStep(run) if graph else run.advance
        run.begin_step()
        loss, norm = advance() if k >= first else run.advance()
        losses += [loss.clone(), norm.clone()]
        run.step += 1
    found = {name: p.detach().cpu() for name, p in run.model.named_parameters()}
    return found | {"losses": torch.stack(losses).cpu()}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*capturable=True")  # steps before the graph
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task, first", [("induction", 0), ("induction", 5), ("copying", 0)])
def test_the_graph_takes_the_eager_steps(tmp_path, task, first, dtype):
    """Each replay draws its own rows at its own rate; the bound is what another backend differs by."""
    with repeatable(True):
        eager = trained(tmp_path, task, False, "", dtype)
        graphed = trained(tmp_path, task, True, "", dtype, first)
        plain = trained(tmp_path, task, False, "torch", dtype)
    assert len(torch.unique(eager["losses"])) == 2 * STEPS
    limits = bounds(plain, eager)
    for name, got in graphed.items():
        check(name, got, eager[name], limits[name])
