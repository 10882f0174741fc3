"""Our language model as a model of lm-eval."""

import contextlib

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype, stop_sequences_criteria

from mamba_fast.checkpoint_config import config_of
from mamba_fast.checkpoint_files import CONFIG, read_json, source_of
from mamba_fast.model import MambaLMHeadModel

TOKENIZER = "EleutherAI/gpt-neox-20b"  # of the published models, whose repositories have none
_ANY = {"gpus", "offload_folder", "trust_remote_code"}  # what lm-eval says of itself, or of the tokenizer


@register_model("mamba_fast")
class MambaFastLM(HFLM):
    """lm-eval's handling of requests, batches and tokens (its model "hf") around :class:`MambaLMHeadModel`.

    pretrained: a folder or a name on the hub, as `from_pretrained` takes it. tokenizer: a folder, a name or
    a tokenizer; by default that of `pretrained` if it has one, else the one of the published models.
    max_length: tokens of one window; longer texts are cut on the left, or read in windows, as lm-eval does.
    dtype: "auto" is float16 on a GPU, as in the published evaluation, else float32. The other arguments are
    those of lm-eval's "hf", without what needs a model of transformers (peft, quantization, parallelize):
    ValueError names it.
    """

    def __init__(self, pretrained="state-spaces/mamba-130m", max_length=2048, **options):
        super().__init__(pretrained=pretrained, backend="causal", max_length=max_length, **options)

    def _get_config(self, pretrained, revision="main", **options):
        source = source_of(pretrained, _branch(revision))
        self._config = config_of(read_json(source, CONFIG), f"{source.name}/{CONFIG}")

    def _create_tokenizer(self, pretrained, tokenizer, revision="main", **options):
        if tokenizer is None:
            source = source_of(pretrained, _branch(revision))
            has = any(source.get(file) for file in ("tokenizer_config.json", "tokenizer.json"))
            tokenizer = pretrained if has else TOKENIZER
        if tokenizer != pretrained:  # then the revision is not one of the tokenizer's
            revision = "main"
        super()._create_tokenizer(pretrained, tokenizer, revision=revision, **options)

    def _create_model(self, pretrained, revision="main", dtype="auto", **options):
        refused = sorted(name for name, value in options.items() if value and name not in _ANY)
        if refused:
            raise ValueError(f"model_args: mamba_fast does not take {', '.join(refused)}; --model hf may")
        if dtype in (None, "auto"):
            dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self._model = MambaLMHeadModel.from_pretrained(
            pretrained, device=self.device, dtype=get_dtype(dtype), revision=_branch(revision)
        )

    def _model_generate(self, context, max_length, stop, attention_mask=None, **options):
        """(B, L) left-padded prompts to (B, up to max_length): until each row has one of `stop` in it."""
        until = _Until(stop, self.tokenizer, len(context))
        half = {"dtype": self.mixed_precision_dtype, "enabled": self.mixed_precision_dtype is not None}
        with torch.autocast(self.device.type, **half), contextlib.suppress(_Stopped):
            self.model.generate(
                context, max_length, eos_token_id=self.eot_token_id, attention_mask=attention_mask,
                streamer=until, cg=True, **_sampling(**options),
            )  # fmt: skip
        return torch.cat([context, *(v.to(context.device) for v in until.tokens)], 1)


def _sampling(do_sample=None, temperature=0.0, **filters):
    """lm-eval's arguments as `generate` takes them: a sample is of the top 50, as in transformers."""
    unknown = sorted(filters.keys() - {"top_k", "top_p", "min_p", "repetition_penalty"})
    if unknown:
        raise ValueError(f"gen_kwargs: mamba_fast does not take {', '.join(unknown)}")
    if do_sample and not temperature:  # lm-eval's default is 0; its "hf" refuses it too
        raise ValueError(
            f"gen_kwargs: do_sample = True expects a temperature above 0, got temperature = {temperature}"
        )
    if do_sample is False or not temperature:
        return filters | {"top_k": 1}
    return {"top_k": 50, "temperature": temperature} | filters


class _Stopped(Exception):
    """Every row has its end."""


class _Until:
    """A streamer that keeps the new tokens, and raises _Stopped when every row has one of `stop` in them."""

    def __init__(self, stop, tokenizer, batch):
        self.criteria = stop_sequences_criteria(tokenizer, stop, 0, batch)
        self.reach = max((c.sequence_id_len for c in self.criteria), default=1)  # tokens that they look at
        self.prompt, self.tokens = None, []

    def put(self, tokens):
        if self.prompt is None:
            self.prompt = tokens
            return
        self.tokens.append(tokens)
        recent = torch.cat(self.tokens[-self.reach :], 1)
        for criterion in self.criteria:
            criterion(recent, None)
        if self.criteria and all(
            any(row) for row in zip(*(c.done_tracker for c in self.criteria), strict=True)
        ):
            raise _Stopped

    def end(self):
        pass


def _branch(revision):
    """lm-eval's default, for `from_pretrained`."""
    return None if revision == "main" else revision
