"""The models that the generation bench compares: ours, the published one, and Pythia by transformers."""

import importlib
import re
import sys
from dataclasses import asdict

import torch

from mamba_fast.config import MambaConfig
from mamba_fast.model import MambaLMHeadModel

VOCAB = {"mamba": 50277, "pythia": 50304}
MAMBA = {  # d_model, layers
    "130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64),
}  # fmt: skip
PYTHIA = {  # width, layers, heads
    "70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16), "1b": (2048, 16, 8),
    "1.4b": (2048, 24, 16), "2.8b": (2560, 32, 32),
}  # fmt: skip
RANDOM = re.compile(r"random:(mamba|pythia)-(?:(\d+)x(\d+)|([\w.]+))")
NAMES = "state-spaces/mamba-*, EleutherAI/pythia-*, a folder, random:mamba-SIZE, random:pythia-SIZE"


class Ours:
    """MambaLMHeadModel behind the one function that is timed."""

    name, role = "mamba_fast", "ours"

    def __init__(self, model):
        self.model, self.vocab = model, model.config.vocab_size

    def generate(self, input_ids, new, sampling):
        """input_ids (B, L) and `new` tokens more, (B, L + new)."""
        return self.model.generate(input_ids, input_ids.shape[1] + new, cg=True, **sampling)

    def token_bytes(self, batch, seqlen):
        """What a token must move: the weights once, every state once in and once out."""
        weights = sum(p.nbytes for p in self.model.parameters())
        states = self.model.allocate_inference_cache(1, 0).values()
        return weights + 2 * batch * sum(v.nbytes for pair in states for v in pair)


class Published(Ours):
    """The published class with the same weights, as its own benchmark calls it."""

    name, role = "published", "peer"


class Pythia:
    """A GPT-NeoX through transformers' generate, with its cache of keys and values."""

    name, role = "transformers", "other"

    def __init__(self, model):
        self.model, self.vocab = model, model.config.vocab_size

    def generate(self, input_ids, new, sampling):
        sampling = dict(sampling)
        sampling["top_p"] = sampling["top_p"] or 1.0
        if sampling["top_k"] == 1:
            sampling = {"repetition_penalty": sampling["repetition_penalty"]}
        return self.model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=new, min_new_tokens=new,
            do_sample="top_k" in sampling, pad_token_id=0, use_cache=True, **sampling,
        )  # fmt: skip

    def token_bytes(self, batch, seqlen):
        """The weights once, and the keys and values of `seqlen` tokens."""
        config, weights = self.model.config, sum(p.nbytes for p in self.model.parameters())
        size = self.model.dtype.itemsize
        return weights + 2 * batch * seqlen * config.num_hidden_layers * config.hidden_size * size


def load(name, device, dtype):
    """The model that `name` asks for: :class:`Ours` or :class:`Pythia`. ValueError for an unknown size."""
    found = RANDOM.fullmatch(name)
    if name.startswith("random:") and not found:
        raise ValueError(f"--model-name: expected {NAMES}, got {name}")
    torch.manual_seed(0)
    if found and found[1] == "mamba":
        d_model, n_layer = _size(found, MAMBA, name)
        config = MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCAB["mamba"])
        return Ours(MambaLMHeadModel(config, device=device, dtype=dtype))
    if found:
        return Pythia(_gpt_neox(*_size(found, PYTHIA, name)).to(device, dtype).eval())
    if "pythia" in name:
        auto = _transformers().AutoModelForCausalLM
        return Pythia(auto.from_pretrained(name, dtype=dtype).to(device).eval())
    return Ours(MambaLMHeadModel.from_pretrained(name, device=device, dtype=dtype))


def published(ours):
    """The published package's model with the weights of ours, or None where it cannot be imported (said)."""
    weight = ours.model.lm_head.weight
    try:
        for name in ("causal_conv1d_cuda", "selective_scan_cuda"):
            importlib.import_module(name)
        config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
        model = importlib.import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel
    except ImportError as error:
        print(f"published model: not timed, {error}", file=sys.stderr)
        return None
    theirs = model(config(**asdict(ours.model.config)), device=weight.device, dtype=weight.dtype)
    theirs.load_state_dict(ours.model.state_dict(), assign=True)
    theirs.tie_weights()
    return Published(theirs)


def _size(found, sizes, name):
    if found[2]:
        return (int(found[2]), int(found[3]), 2)[: len(next(iter(sizes.values())))]
    if found[4] not in sizes:
        known = ", ".join(sizes)
        raise ValueError(f"--model-name: expected a size among {known}, or WIDTHxLAYERS, got {name}")
    return sizes[found[4]]


def _gpt_neox(width, layers, heads):
    transformers = _transformers()
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB["pythia"], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, rotary_pct=0.25, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def _transformers():
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ImportError("a Pythia model needs transformers: pip install 'mamba-fast[hf]'") from None
