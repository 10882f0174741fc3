"""One token after another: buffers that stay where they are, the step on them, and CUDA graphs of it."""

import weakref
from dataclasses import dataclass

import torch

from mamba_fast.inference import InferenceParams
from mamba_fast.ops.next_token import Slots, greedy_token, record
from mamba_fast.ops.next_token.torch_next import penalise
from mamba_fast.prompt_graphs import PromptGraphs
from mamba_fast.sampling import sample
from mamba_fast.whole_step import whole_step

RING = 128  # tokens that a decoder takes and gives before the host looks after it
SEVERAL = 8  # steps that are one graph, where nobody looks in between
# Bytes of parameters up to which they are: the step of a larger model is so long that the launch of a graph
# is nothing beside it.
MOST_BYTES = 2**30
MOST_GRAPHS = 16  # of one model, the least recently used one is given up first
WARMUPS = 2


@dataclass(frozen=True)
class Recipe:
    """Which operations a step consists of. The numbers in them may change without a new graph.

    filters: those of top_p, min_p and temperature that take part. eos: how many tokens end a row.
    """

    top_k: int = 1
    filters: tuple = ()
    penalty: bool = False
    eos: int = 0
    forced: bool = False
    vocab_size: int | None = None

    @property
    def plain(self):
        """Whether the token is the likeliest of the logits as they are."""
        return self.top_k == 1 and not self.penalty and not self.forced

    @property
    def random(self):
        return self.top_k != 1


class Decoder:
    """The step of `batch` rows: reads the last token, writes the next one, all of it on the device.

    slots: the last token, (RING, B) tokens since :meth:`refill`, which rows have ended, what was seen.
    uniforms (RING, B) in [0, 1): one a token, to sample with. forced (RING, B): what to take in place of a
    sample, -1 for nothing. numbers: the values of the filters. states: as allocate_inference_cache makes
    them, for at least B rows.
    """

    def __init__(self, model, batch, recipe, states):
        weight = model.lm_head.weight
        self.recipe, self.logits = recipe, None
        self.graphs, self.most, self.side = {}, 1, None  # {steps: (graph, where its logits are)}
        self.whole = recipe.plain  # whether a step may be taken whole with its choice
        self.prompts = self.pool = None  # of a captured one: graphs that read a prompt, and their memory
        self.params = InferenceParams(0, batch, seqlen_offset=1, key_value_memory_dict=states)

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        penalised = ()
        if recipe.penalty:
            penalised = (zeros(batch, weight.shape[0], dtype=torch.bool), zeros(dtype=torch.float32).fill_(1))
        self.slots = Slots(
            zeros(batch, 1), zeros(RING, batch), zeros(batch), zeros(recipe.eos),
            zeros(batch, dtype=torch.bool), *penalised,
        )  # fmt: skip
        self.uniforms = zeros(RING, batch, dtype=torch.float64)
        self.forced = zeros(RING, batch)
        self.numbers = {name: zeros(dtype=torch.float32).fill_(1) for name in recipe.filters}

    def begin(self, eos, **numbers):
        """Forget the last batch; `numbers` and `eos` for this one."""
        self.slots.finished.zero_()
        for name, kept in self.numbers.items():
            kept.fill_(numbers[name])
        if self.recipe.penalty:
            self.slots.seen.zero_()
            self.slots.penalty.fill_(numbers["repetition_penalty"])
        for kept, value in zip(self.slots.eos, eos, strict=True):
            kept.fill_(value)

    def refill(self, uniforms, forced):
        """For the next RING tokens: (at most RING, B) each, or None where the recipe has no use for it."""
        self.slots.place.zero_()
        for kept, new in ((self.uniforms, uniforms), (self.forced, forced)):
            if new is not None:
                kept[: len(new)].copy_(new)

    def advance(self, model, wanted=1):
        """One token more, or if at least SEVERAL are wanted, perhaps as many; returns how many.

        `logits` are those of the last one.
        """
        steps = 1
        if not self.graphs:
            self._step(model)
        else:
            steps = SEVERAL if min(wanted, self.most) >= SEVERAL else 1
            if steps not in self.graphs:
                self._capture(model, steps)
            graph, self.logits = self.graphs[steps]
            graph.replay()
        self.params.seqlen_offset += steps
        return steps

    def choose(self, logits):
        """The next token of logits (B, V), written to its slots. The logits are kept as they were."""
        recipe, slots = self.recipe, self.slots
        self.logits = logits = logits[:, : recipe.vocab_size]
        if recipe.top_k == 1 and not recipe.forced:
            greedy_token(logits, slots)
            return
        if recipe.penalty:
            logits = penalise(logits, slots.seen[:, : logits.shape[1]], slots.penalty)
        filters = {name: self.numbers[name] for name in recipe.filters}
        token = sample(logits, self._here(self.uniforms), recipe.top_k, **filters)
        record(token, slots, self._here(self.forced) if recipe.forced else None)

    def _here(self, ring):
        """What the ring has for the next token of each row: (B,)."""
        return ring.gather(0, self.slots.place[None])[0]

    def capture(self, model, pool):
        """Make a CUDA graph of the step. It changes the states: a prompt has to follow."""
        device = self.slots.token.device
        self.side, self.pool = torch.cuda.Stream(device), pool
        self.side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.side):  # kernels are compiled and libraries made ready before the capture
            for _ in range(WARMUPS):
                self._step(model)
        torch.cuda.current_stream(device).wait_stream(self.side)
        if sum(p.numel() * p.element_size() for p in model.parameters()) <= MOST_BYTES:
            self.most = SEVERAL
        self._capture(model, 1)

    def _capture(self, model, steps):
        """A graph of so many steps. It runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
            for _ in range(steps):
                self._step(model)
        self.graphs[steps] = graph, self.logits  # where every replay leaves them

    def _step(self, model):
        if self.whole:
            columns = self.recipe.vocab_size
            logits = whole_step(model, self.slots.token, self.params, self.slots, columns)
            if logits is not None:
                self.logits = logits[:, -1, :columns]
                return
            self.whole = False
        out = model(self.slots.token, inference_params=self.params, num_last_tokens=1)
        self.choose(out.logits[:, -1])


class Graphs:
    """The captured decoders of one model: for each batch and recipe one, all on the same states.

    The states have room for the largest batch so far; a smaller one uses their first rows. A larger batch,
    and parameters that have moved or have changed their type, start anew.
    """

    def __init__(self):
        self.made_for, self.rows, self.states, self.pool = None, 0, None, None
        self.decoders, self.prompts = {}, {}

    def decoder(self, model, batch, recipe):
        made_for = _placement(model)
        if made_for != self.made_for or batch > self.rows:
            self.states = self.pool = None
            self.decoders.clear(), self.prompts.clear()
            self.made_for, self.rows = made_for, batch
            self.states = model.allocate_inference_cache(batch, 0)
            self.pool = torch.cuda.graph_pool_handle()
        found = self.decoders.pop((batch, recipe), None)
        if found is None:
            while len(self.decoders) >= MOST_GRAPHS:
                del self.decoders[next(iter(self.decoders))]
            kept = {rows for rows, _ in self.decoders}
            self.prompts = {rows: v for rows, v in self.prompts.items() if rows in kept}
            found = Decoder(model, batch, recipe, self.states)
            found.capture(model, self.pool)
            found.prompts = self.prompts.setdefault(batch, PromptGraphs(batch, self.states))
        self.decoders[batch, recipe] = found  # the last one is the one used last
        return found


_graphs = weakref.WeakKeyDictionary()  # beside the models: a copy or a pickle of a model has no graphs


def captured_decoder(model, batch, recipe):
    """A :class:`Decoder` whose step is a CUDA graph: made at the first call, found again later."""
    return _graphs.setdefault(model, Graphs()).decoder(model, batch, recipe)


def forget_graphs(model):
    """Give up the graphs and states kept for `model`: to have the memory, or after changing its modules."""
    _graphs.pop(model, None)


def _placement(model):
    """Where the parameters are and of which type: what a captured step has built in."""
    found, modules, seen = [], [model], {id(model)}
    for module in modules:  # as model.parameters(), in less than half the time
        found += [(p.data_ptr(), p.dtype) for p in module._parameters.values() if p is not None]
        for m in module._modules.values():
            if m is not None and id(m) not in seen:
                seen.add(id(m))
                modules.append(m)
    return found
