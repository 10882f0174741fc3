"""Prompts as CUDA graphs: a short prompt costs its host more than its GPU, and a graph spares the host.

A graph has one length. So prompts are padded on the left up to the next of a few lengths, which by the rules
of attention_mask changes nothing; what is longer than the longest is read piece by piece. The padding
of many rows is work for a GPU that is busy: there lengths are closer to each other.
"""

import torch

from mamba_fast.inference import InferenceParams
from mamba_fast.layout import left_padded

LENGTHS = (64, 128, 256, 512, 1024)
MANY_TOKENS = 4096  # of all rows in a piece: with more, a step between two lengths is an eighth of the longer
MOST_TOKENS = 32768  # with more, the GPU is busy and the host is not in its way
MOST_PIECES = 16  # graphs of one batch size, the least recently used one is given up first


def fits(batch, seqlen):
    """Whether a prompt of (batch, seqlen) is better read by graphs."""
    return batch * max(_lengths(batch, seqlen)) <= MOST_TOKENS


def _lengths(batch, seqlen):
    """The lengths of the pieces: one that holds what is left over, then the longest as often as it takes."""
    longest, (whole, rest) = LENGTHS[-1], divmod(seqlen, LENGTHS[-1])
    pieces = whole * [longest]
    if rest:
        first = next(n for n in LENGTHS if n >= rest)
        step = first // 8 if batch * first > MANY_TOKENS else first
        pieces.insert(0, -(-rest // step) * step)
    return pieces


class PromptGraphs:
    """Reads prompts of `batch` rows into `states`, made by allocate_inference_cache for at least B rows."""

    def __init__(self, batch, states):
        self.batch, self.states, self.pieces = batch, states, {}

    def read(self, model, input_ids, attention_mask, pool):
        """Logits (B, V) behind input_ids (B, L), from zero states; overwritten by the next prompt."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        lengths = _lengths(*input_ids.shape)
        padding = sum(lengths) - input_ids.shape[1]  # before the first piece
        input_ids, mask = (torch.nn.functional.pad(v, (padding, 0)) for v in (input_ids, mask))
        kinds = [(length, k == 0) for k, length in enumerate(lengths)]
        for kind in dict.fromkeys(kinds):
            piece = self.pieces.pop(kind, None)
            if piece is None:
                while len(self.pieces) >= MOST_PIECES:
                    del self.pieces[next(iter(self.pieces))]
                piece = _Piece(model, self.states, self.batch, *kind, input_ids.device, pool)
            self.pieces[kind] = piece  # the last one is the one used last
        for kind, ids, real in zip(kinds, input_ids.split(lengths, 1), mask.split(lengths, 1), strict=True):
            logits = self.pieces[kind](model, ids, real)
        return logits


class _Piece:
    """`length` tokens of every row, as a graph on a GPU: the `first` ones, or behind what the states know."""

    def __init__(self, model, states, batch, length, first, device, pool):
        self.params = InferenceParams(0, batch, seqlen_offset=0 if first else 1, key_value_memory_dict=states)
        self.graph = None
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.mask = torch.ones_like(self.ids)
        if device.type == "cuda":
            self._capture(model, pool)

    def __call__(self, model, ids, mask):
        self.ids.copy_(ids), self.mask.copy_(mask)
        if self.graph is None:
            self._run(model)
        else:
            self.graph.replay()
        return self.logits

    def _run(self, model):
        from mamba_fast.model import MambaLMHeadModel

        # Another forward is asked for no more than attention_mask.
        own = getattr(type(model), "forward", None) is MambaLMHeadModel.forward
        padding = {"layout": left_padded(self.mask)} if own else {"attention_mask": self.mask}
        out = model(self.ids, inference_params=self.params, num_last_tokens=1, **padding)
        self.logits = out.logits[:, -1]

    def _capture(self, model, pool):
        device = self.ids.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are compiled and libraries made ready before the capture
            self._run(model)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self._run(model)
