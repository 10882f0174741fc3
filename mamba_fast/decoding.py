"""One token after another: buffers that stay where they are, the step on them, and CUDA graphs of it."""

import weakref
from dataclasses import dataclass

import torch

from mamba_fast.inference import InferenceParams
from mamba_fast.sampling import penalise, sample

RING = 128  # tokens that a decoder takes and gives before the host looks after it
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
    def random(self):
        return self.top_k != 1


class Decoder:
    """The step of `batch` rows: reads the last token, writes the next one, all of it on the device.

    token (B, 1): the last one. tokens (RING, B): the ones since :meth:`refill`, `place` of them. uniforms
    (RING, B) in [0, 1): one a token, to sample with. forced (RING, B): what to take in place of a sample,
    -1 for nothing. numbers: the values of the filters and of the penalty. seen (B, V): tokens the penalty
    is for. finished (B,): rows that have ended. states: as allocate_inference_cache makes them, for at
    least B rows.
    """

    def __init__(self, model, batch, recipe, states):
        weight = model.lm_head.weight
        device = weight.device
        self.recipe, self.graph, self.logits = recipe, None, None
        self.params = InferenceParams(0, batch, seqlen_offset=1, key_value_memory_dict=states)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(RING, batch, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(RING, batch, dtype=torch.float64, device=device)
        self.forced = torch.zeros(RING, batch, dtype=torch.long, device=device)
        names = (*recipe.filters, *(("repetition_penalty",) if recipe.penalty else ()))
        self.numbers = {name: torch.ones((), device=device) for name in names}
        self.eos = torch.zeros(recipe.eos, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        shape = (batch, weight.shape[0]) if recipe.penalty else (0, 0)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device)

    def begin(self, eos, **numbers):
        """Forget the last batch; `numbers` and `eos` for this one."""
        self.finished.zero_()
        self.seen.zero_()
        for name, kept in self.numbers.items():
            kept.fill_(numbers[name])
        for kept, value in zip(self.eos, eos, strict=True):
            kept.fill_(value)

    def refill(self, uniforms, forced):
        """For the next RING tokens: (at most RING, B) each, or None where the recipe has no use for it."""
        self.place.zero_()
        for kept, new in ((self.uniforms, uniforms), (self.forced, forced)):
            if new is not None:
                kept[: len(new)].copy_(new)

    def advance(self, model):
        """One token more."""
        if self.graph is None:
            self._step(model)
        else:
            self.graph.replay()
        self.params.seqlen_offset += 1

    def choose(self, logits):
        """The next token of logits (B, V), written to token and tokens. The logits are kept as they were."""
        recipe = self.recipe
        self.logits = logits = logits[:, : recipe.vocab_size]
        if recipe.penalty:
            seen = self.seen[:, : logits.shape[1]]
            logits = penalise(logits, seen, self.numbers["repetition_penalty"])
        uniform = self.uniforms.index_select(0, self.place)[0] if recipe.random else None
        filters = {name: self.numbers[name] for name in recipe.filters}
        token = sample(logits, uniform, recipe.top_k, **filters)
        if recipe.eos:
            token = torch.where(self.finished, self.eos[0], token)
        if recipe.forced:
            forced = self.forced.index_select(0, self.place)[0]
            token = torch.where(forced < 0, token, forced)
        if recipe.eos:
            self.finished |= (token[:, None] == self.eos).any(-1)
        if recipe.penalty:
            self.seen.scatter_(1, token[:, None], True)
        self.token.copy_(token[:, None])
        self.tokens.index_copy_(0, self.place, token[None])
        self.place += 1

    def capture(self, model, pool):
        """Make a CUDA graph of the step. It changes the states: a prompt has to follow."""
        device = self.token.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are compiled and libraries made ready before the capture
            for _ in range(WARMUPS):
                self._step(model)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self._step(model)
        self.graph = graph

    def _step(self, model):
        out = model(self.token, inference_params=self.params, num_last_tokens=1)
        self.choose(out.logits[:, -1])


class Graphs:
    """The captured decoders of one model: for each batch and recipe one, all on the same states.

    The states have room for the largest batch so far; a smaller one uses their first rows. A larger batch,
    and parameters that have moved or have changed their type, start anew.
    """

    def __init__(self):
        self.made_for, self.rows, self.states, self.pool, self.decoders = None, 0, None, None, {}

    def decoder(self, model, batch, recipe):
        made_for = _placement(model)
        if made_for != self.made_for or batch > self.rows:
            self.states = self.pool = None
            self.decoders.clear()
            self.made_for, self.rows = made_for, batch
            self.states = model.allocate_inference_cache(batch, 0)
            self.pool = torch.cuda.graph_pool_handle()
        found = self.decoders.pop((batch, recipe), None)
        if found is None:
            while len(self.decoders) >= MOST_GRAPHS:
                del self.decoders[next(iter(self.decoders))]
            found = Decoder(model, batch, recipe, self.states)
            found.capture(model, self.pool)
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
    return tuple((p.data_ptr(), p.dtype) for p in model.parameters())
