"""A whole optimizer step as one CUDA graph: one launch in place of hundreds."""

import warnings

import torch

WARM_UP = 3  # steps before the capture: kernels are compiled, workspaces made, optimizer states created


class GraphedStep:
    """run.advance() captured once, data generation and optimizer included; each call replays it.

    For a run whose batches are drawn on the GPU by `run.data.generator`. The step is the eager one, the same
    kernels in the same order; the warm-up is undone, so that every step of the run is a replay.
    Returns (loss, norm of the gradient), two tensors that the next call overwrites.
    """

    def __init__(self, run):
        stream = torch.cuda.Stream()  # of the warm-up too: a backward runs on the stream of its forward
        before = [v.clone() for v in _changed_by_a_step(run)]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # these steps are not captured
            for _ in range(WARM_UP):
                run.begin_step()
                run.advance()
            _undo(run, before)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(run.data.generator)
        with torch.cuda.graph(self.graph, stream=stream):
            self.found = run.advance()

    def __call__(self):
        self.graph.replay()
        return self.found


def _changed_by_a_step(run):
    """Parameters, then the states of the optimizer, none before its first step."""
    states = run.optimizer.state
    for parameter in run.model.parameters():
        yield parameter.detach()
        yield from (v for _, v in sorted(states.get(parameter, {}).items()))


@torch.no_grad()
def _undo(run, before):
    """Parameters and states of the optimizer as they were: `before`, or zero if there were none yet."""
    now = list(_changed_by_a_step(run))
    fresh = len(before) < len(now)
    if fresh:
        parameters = list(run.model.parameters())
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
            for state in run.optimizer.state[parameter].values():
                state.zero_()
    else:
        for v, value in zip(now, before, strict=True):
            v.copy_(value)
