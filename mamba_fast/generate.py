"""python -m mamba_fast.generate: a prompt continued by a published model, or by one of yours, as it comes."""

import argparse
import sys
import time
from pathlib import Path

import torch

from mamba_fast.checkpoints import CheckpointError
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.sampling import check_sampling

TOKENIZER = "EleutherAI/gpt-neox-20b"  # that of the published models
DTYPES = ("float16", "bfloat16", "float32")


def main(arguments=None):
    options = parse(arguments)
    device = torch.device(options.device)
    try:
        tokenizer = load_tokenizer(options.tokenizer or tokenizer_of(options.model_name))
        dtype = dtype_of(options.dtype, device)
        model = MambaLMHeadModel.from_pretrained(options.model_name, device=device, dtype=dtype)
    except (ImportError, CheckpointError, OSError) as error:
        sys.exit(str(error))
    prompts = options.prompt
    streamer = _streamer(tokenizer) if len(prompts) == 1 else None
    batch = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(device)
    if not batch.attention_mask.any(-1).all():
        sys.exit("--prompt: expected at least one token in each, got an empty text")
    if batch.input_ids.max() >= model.lm_head.out_features:
        sys.exit(f"--tokenizer: has tokens beyond the model's {model.lm_head.out_features}: not this model's")
    start = time.perf_counter()
    text = model.generate(
        batch.input_ids, batch.input_ids.shape[1] + options.genlen, attention_mask=batch.attention_mask,
        eos_token_id=tokenizer.eos_token_id, vocab_size=min(len(tokenizer), model.lm_head.out_features),
        cg=True, seed=options.seed, streamer=streamer, **sampling_of(options),
    )  # fmt: skip
    new = text[:, batch.input_ids.shape[1] :].cpu()
    seconds = time.perf_counter() - start
    if streamer is None:
        for prompt, row in zip(prompts, new, strict=True):
            print(prompt + tokenizer.decode(row, skip_special_tokens=True), end="\n\n")
    print(f"{new.numel()} tokens, {new.numel() / seconds:.1f} a second with the prompt", file=sys.stderr)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m mamba_fast.generate", description=__doc__)
    parser.add_argument("--model-name", default="state-spaces/mamba-130m", help="on the hub, or a folder")
    parser.add_argument("--tokenizer", help=f"default: the folder's own, or {TOKENIZER}")
    parser.add_argument("--prompt", nargs="+", required=True, help="one is streamed, several are a batch")
    parser.add_argument("--genlen", type=int, default=100, help="at most so many new tokens")
    add_sampling(parser)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    options = parser.parse_args(arguments)
    check_sampling_options(parser, options)
    if options.genlen < 1:
        parser.error(f"--genlen: expected at least 1, got {options.genlen}")
    return options


def add_sampling(parser):
    """The published script's flags for how a token is chosen."""
    parser.add_argument(
        "--topk", type=int, help="1 is greedy, 0 no limit; default: 0 with any of the next three"
    )
    parser.add_argument("--topp", type=float, default=1.0)
    parser.add_argument("--minp", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)


def check_sampling_options(parser, options):
    try:
        check_sampling(**sampling_of(options))
    except ValueError as error:
        parser.error(str(error))


def sampling_of(options):
    """The keywords of generate. Without --topk, whoever asks for a way of sampling gets it: not greedy."""
    asked = options.topp not in (0, 1) or options.minp != 0 or options.temperature != 1
    return {
        "top_k": options.topk if options.topk is not None else 0 if asked else 1,
        "top_p": options.topp,
        "min_p": options.minp,
        "temperature": options.temperature,
        "repetition_penalty": options.repetition_penalty,
    }


def dtype_of(name, device):
    return getattr(torch, name or ("float16" if device.type == "cuda" else "float32"))


def tokenizer_of(model_name):
    """Where the tokens of a model come from: its folder, an -hf name, or the published one."""
    folder = Path(model_name)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return model_name
    return model_name if model_name.endswith("-hf") and not folder.is_dir() else TOKENIZER


def load_tokenizer(name):
    """transformers' tokenizer, set up for padding on the left."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError("text needs transformers' tokenizers: pip install 'mamba-fast[hf]'") from None
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _streamer(tokenizer):
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_special_tokens=True)


if __name__ == "__main__":
    main()
