"""Text from a model: the prompt in sequence form, then one step a token (section 3.2: recurrent mode)."""

import contextlib
import operator
import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_fast import prompt_graphs
from mamba_fast.decoding import RING, Decoder, Recipe, captured_decoder
from mamba_fast.sampling import check_sampling

IDLE = {"top_p": (0, 1), "min_p": (0,), "temperature": (1,)}  # values that filter nothing
NUMBERS = (*IDLE, "repetition_penalty")


class GenerateOutput(NamedTuple):
    """sequences (B, L) with the prompt; scores: the raw logits (B, V) of every new token, or None."""

    sequences: Tensor
    scores: tuple | None = None


class GenerationMixin:
    """`generate` for a language model with `allocate_inference_cache` and inference_params."""

    def generate(
        self, input_ids, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0,
        return_dict_in_generate=False, output_scores=False, **kwargs,
    ):  # fmt: skip
        """Continue input_ids (B, L) up to max_length tokens, prompt included: see :func:`decode`.

        Returns sequences (B, up to max_length), or with return_dict_in_generate a
        :class:`GenerateOutput`.
        """
        out = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores,
            **kwargs,
        )  # fmt: skip
        return out if return_dict_in_generate else out.sequences


def decode(
    input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, repetition_penalty=1.0,
    eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, enable_timing=False,
    output_scores=False, streamer=None, *, attention_mask=None, seed=None, generator=None,
    prefill_chunk=None,
):  # fmt: skip
    """Greedy (top_k = 1) or sampled continuation of every row of input_ids (B, L), int64.

    A token is drawn from the logits after, in this order: repetition_penalty, top_k, min_p, temperature,
    top_p (:func:`mamba_fast.sampling.filtered`).

    Parameters
    ----------
    max_length : tokens of a row in the end, the prompt and its padding among them
    top_k : the k highest logits alone; 1 is greedy, 0 no limit
    top_p : of what is left, the fewest tokens that hold this probability; 0 and 1: all
    min_p : tokens at least this many times as likely as the likeliest, before the temperature; 0: all
    repetition_penalty : logits of tokens that the row has already are divided by it, negative ones
        multiplied
    eos_token_id : one token or several: a row that has one is filled up with the first of them; when every
        row has ended, all end
    teacher_outputs : (B, T), prompt included: tokens to take in place of a sample, as far as they go. A
        row then ends by eos only when all do at once.
    vocab_size : use the first so many logits; None: all, those of the padded vocabulary too
    cg : take every step as one CUDA graph (of a small model eight steps, where nobody looks at each),
        captured once for a batch size and kinds of filters, and kept with the states; a prompt too, padded
        to one of a few lengths, unless it keeps the GPU busy by itself or prefill_chunk is given. On a CPU
        without effect.
    enable_timing : print the time of prompt and decoding
    output_scores : keep the raw logits of every new token, before penalty and filters
    streamer : its `put` gets the prompt, then the tokens (B, 1) of every step, on the CPU; then `end`
    attention_mask : (B, L), 0 for padding on the left: a row gives what it gives unpadded
    seed, generator : where the randomness comes from, else torch's global one of the CPU. The same seed
        samples alike with and without cg and, up to rounding, on every device.
    prefill_chunk : read the prompt in pieces of so many tokens: less memory for a long one

    Returns a :class:`GenerateOutput`. TypeError and ValueError name the argument, what came and what is
    accepted. Cost: the prompt as a forward pass; each token reads all weights once, and reads and writes
    the states of every row. The host waits for no token; with eos_token_id or a streamer, for the one
    before the last.
    """
    check_sampling(top_k, top_p, min_p, temperature, repetition_penalty)
    for name, value in (("vocab_size", vocab_size), ("prefill_chunk", prefill_chunk)):
        if value is not None and _whole(name, value) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    attention_mask = _check_ids(input_ids, max_length, attention_mask, teacher_outputs)
    input_ids, eos, new = input_ids.long(), _as_list(eos_token_id), int(max_length) - input_ids.shape[1]
    numbers = dict(zip(NUMBERS, (top_p, min_p, temperature, repetition_penalty), strict=True))
    filters = tuple(name for name, idle in IDLE.items() if top_k != 1 and numbers[name] not in idle)
    forced = _forced(teacher_outputs, input_ids, new)
    recipe = Recipe(int(top_k), filters, repetition_penalty != 1, len(eos), forced is not None, vocab_size)
    uniforms = _uniforms(new, input_ids, seed, generator) if recipe.random else None
    timed = _printed_time(input_ids.device) if enable_timing else contextlib.nullcontext()
    with _undifferentiated(input_ids.device), timed:
        decoder = _decoder(model, len(input_ids), recipe, cg and input_ids.is_cuda)
        decoder.begin(eos, **numbers)
        logits = _prefill(model, input_ids, attention_mask, decoder, prefill_chunk)
        run = _Run(model, decoder, uniforms, forced, eos, output_scores, streamer)
        return run(input_ids, logits, new)


class _Run:
    """The loop over the new tokens of one batch."""

    def __init__(self, model, decoder, uniforms, forced, eos, output_scores, streamer):
        self.model, self.decoder, self.uniforms, self.forced = model, decoder, uniforms, forced
        self.streamer, self.output_scores = streamer, output_scores
        self.eos = torch.tensor(eos, dtype=torch.long, device="cpu")
        self.on_gpu = decoder.slots.token.is_cuda
        self.followed = 0

    def __call__(self, input_ids, logits, new):
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        scores, pieces, count = [], [], 0
        followed = self._follow(self._steps(logits, new))
        for count in followed:
            if self.output_scores:
                scores.append(self.decoder.logits.clone())
            if count % RING == 0:
                pieces.append(self.decoder.slots.tokens.clone())
        pieces.append(self.decoder.slots.tokens[: count % RING].clone())
        if self.streamer is not None:
            self.streamer.end()
        kept = self.followed or count
        tokens = torch.cat(pieces)[:kept].T
        return GenerateOutput(
            torch.cat([input_ids, tokens], 1), tuple(scores[:kept]) if self.output_scores else None
        )

    def _steps(self, logits, new):
        """Take the steps; yields how many tokens there are now."""
        done, followed = 0, self.output_scores or self.streamer is not None or len(self.eos)
        while done < new:
            if done % RING == 0:
                parts = (v if v is None else v[done : done + RING] for v in (self.uniforms, self.forced))
                self.decoder.refill(*parts)
            if done == 0:
                self.decoder.choose(logits)
                done = 1
            else:
                left = min(new - done, RING - done % RING)
                done += self.decoder.advance(self.model, 1 if followed else left)
            yield done

    def _follow(self, steps):
        """`steps`, seen from the host, where someone has to look: on a GPU one step behind it."""
        if self.streamer is None and not len(self.eos):
            yield from steps
            return
        slots = [torch.zeros_like(self.decoder.slots.token, device="cpu") for _ in range(2)]
        if self.on_gpu:
            slots = [v.pin_memory() for v in slots]
        on_the_way = deque()
        for count in steps:
            slot = slots[count % 2]
            slot.copy_(self.decoder.slots.token, non_blocking=True)
            on_the_way.append((slot, self._event()))
            yield count
            if len(on_the_way) > self.on_gpu and self._look(*on_the_way.popleft()):
                return
        while on_the_way and not self._look(*on_the_way.popleft()):
            pass

    def _event(self):
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _look(self, token, event):
        """Show the streamer this token (B, 1); True if it ends the batch."""
        if event is not None:
            event.synchronize()
        self.followed += 1
        if self.streamer is not None:
            self.streamer.put(token.clone())
        return bool(len(self.eos) and torch.isin(token, self.eos).all())


def _decoder(model, batch, recipe, captured):
    if captured and not torch.is_autocast_enabled("cuda"):
        return captured_decoder(model, batch, recipe)
    return Decoder(model, batch, recipe, model.allocate_inference_cache(batch, 0))


def _prefill(model, input_ids, attention_mask, decoder, chunk):
    """Logits (B, V) behind the prompt; the states and what is seen of it stay in the decoder."""
    params, seqlen = decoder.params, input_ids.shape[1]
    params.reset(seqlen, len(input_ids))
    if decoder.prompts is not None and chunk is None and prompt_graphs.fits(*input_ids.shape):
        logits = decoder.prompts.read(model, input_ids, attention_mask, decoder.pool)
        params.seqlen_offset = seqlen
    for start in range(params.seqlen_offset, seqlen, chunk or seqlen):
        part = slice(start, start + (chunk or seqlen))
        mask = {} if attention_mask is None else {"attention_mask": attention_mask[:, part]}
        ids = input_ids[:, part]
        logits = model(ids, inference_params=params, num_last_tokens=1, **mask).logits[:, -1]
        params.seqlen_offset += ids.shape[1]
    if decoder.recipe.penalty:
        ids = input_ids
        if attention_mask is not None:
            ids = ids.where(attention_mask != 0, ids[:, -1:])  # padding counts for nothing
        decoder.slots.seen.scatter_(1, ids, True)
    return logits


def _uniforms(new, input_ids, seed, generator):
    """(new, B) float64 numbers in [0, 1), on the device of the ids."""
    if seed is not None and generator is not None:
        raise ValueError("seed: expected None beside a generator, which has its own")
    if seed is not None:
        generator = torch.Generator().manual_seed(_whole("seed", seed))
    at = {"dtype": torch.float64, "device": "cpu" if generator is None else generator.device}
    return torch.rand(new, len(input_ids), generator=generator, **at).to(input_ids.device)


def _forced(teacher_outputs, input_ids, new):
    """(new, B): the teacher's tokens behind the prompt, and -1 where there are none."""
    if teacher_outputs is None:
        return None
    seqlen = input_ids.shape[1]
    given = teacher_outputs[:, seqlen : seqlen + new].T.to(input_ids)
    return torch.cat([given, given.new_full((new - len(given), len(input_ids)), -1)])


def _as_list(eos_token_id):
    """The tokens that end a row: None, one, or several in a list, a set, a tensor."""
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.tolist()
    if eos_token_id is None or isinstance(eos_token_id, (list, tuple, set)):
        return [_whole("eos_token_id", token) for token in eos_token_id or ()]
    return [_whole("eos_token_id", eos_token_id)]


def _whole(name, value):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def _check_ids(input_ids, max_length, attention_mask, teacher_outputs):
    """Errors that name the argument; the attention_mask, or None where it masks nothing."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids: expected a tensor of int64 or int32, got {_kind(input_ids)}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: expected (B, L), neither of them 0, got {tuple(input_ids.shape)}")
    batch, seqlen = input_ids.shape
    if _whole("max_length", max_length) <= seqlen:
        raise ValueError(f"max_length: counts the prompt of {seqlen} tokens too, got {max_length}")
    for name, value in (("teacher_outputs", teacher_outputs), ("attention_mask", attention_mask)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {_kind(value)}")
    if teacher_outputs is not None and (teacher_outputs.dim() != 2 or len(teacher_outputs) != batch):
        shape = tuple(teacher_outputs.shape)
        raise ValueError(f"teacher_outputs: expected (B, T) with B = {batch}, got {shape}")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected (B, L) = ({batch}, {seqlen}), got {shape}")
    real = attention_mask != 0
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("attention_mask: generate expects padding on the left alone, the last token real")
    return None if real.all() else attention_mask


def _kind(value):
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__


@contextlib.contextmanager
def _undifferentiated(device):
    """No gradients; and what is kept for the next call does not depend on the mode of this one."""
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), here:
        yield


@contextlib.contextmanager
def _printed_time(device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    print(f"Prompt processing + decoding time: {1e3 * (time.perf_counter() - start):.0f}ms")
