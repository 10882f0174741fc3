"""Generation: prompt and new tokens of whole models, in time a token and in tokens a second.

The flags are those of the published script; each of --model-name and --batch takes several. What is timed
is checked first: the tokens that our steps choose are those of the sequence form.
"""

import argparse
import copy
import functools
import gc
import itertools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from mamba_fast.bench import generation_models as models
from mamba_fast.bench import report
from mamba_fast.bench.case import generator_of, type_name
from mamba_fast.bench.checks import CheckFailed, K
from mamba_fast.bench.timing import in_turn, limit_ms, speeds
from mamba_fast.generate import (
    DTYPES,
    add_sampling,
    check_sampling_options,
    dtype_of,
    load_tokenizer,
    sampling_of,
)
from mamba_fast.generate import tokenizer_of as tokenizer_name

CHECKED_ROWS = 2
GREEDY = {"top_k": 1, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "repetition_penalty": 1.0}
BUDGET_MS = 20_000  # of one measurement, once it has been taken three times


def main(arguments=None):
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = dtype_of(options.dtype, device)
    machine = speeds(device)
    try:
        rows = list(rows_of(options, device, dtype, machine))
    except (CheckFailed, ValueError, ImportError, OSError) as error:
        sys.exit(f"{error}: nothing is written")
    facts = report.machine(device)
    said = findings(rows)
    result = {"bench": "generation"} | facts | machine | {"checks": "passed", "findings": said, "rows": rows}
    result = report.rounded(result)
    out, picture = report.keep(result, options.out, options.figure)
    print(table(result["rows"]))
    print(*said, sep="\n")
    print(f"{facts['device']}, {facts['date']}, torch {facts['torch']}; a copy moves", end=" ")
    print(f"{machine['copy_bytes_per_s'] / 1e9:.0f} GB/s; checks passed; written to {out} and {picture}")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m mamba_fast.bench generation", description=__doc__)
    default = "state-spaces/mamba-130m"
    parser.add_argument("--model-name", nargs="+", action="extend", help=f"{models.NAMES}; default {default}")
    parser.add_argument("--prompt", help="a text in place of random tokens; what follows is printed")
    parser.add_argument("--promptlen", type=int, default=100)
    parser.add_argument("--genlen", type=int, default=100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--case", action="append", default=[], help="one more: NAME,BATCH,PROMPTLEN,GENLEN")
    add_sampling(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="time the published package too, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: docs/results/generation-DEVICE.json")
    parser.add_argument("--figure", type=Path, help="default: beside the JSON file")
    options = parser.parse_args(arguments)
    check_sampling_options(parser, options)
    names = options.model_name or ([] if options.case else [default])
    lengths = (options.promptlen, options.genlen)
    options.cases = [(name, batch, *lengths) for name, batch in itertools.product(names, options.batch)]
    for text in options.case:
        name, *sizes = text.split(",")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            parser.error(f"--case: expected NAME,BATCH,PROMPTLEN,GENLEN, got {text}")
        options.cases.append((name, *map(int, sizes)))
    for _, batch, prompt, new in options.cases:
        if min(batch, prompt) < 1 or new < 2:
            parser.error("--batch, --promptlen: expected at least 1, and at least 2 for --genlen")
    return options


def rows_of(options, device, dtype, machine):
    """One row for each model and competitor: sizes, times in ms, tokens a second, the limit of a token."""
    for name, cases in itertools.groupby(options.cases, key=lambda case: case[0]):
        tqdm.write(f"loading {name}", file=sys.stderr)
        first = models.load(name, device, dtype)
        rivals = [first]
        if options.peer and device.type == "cuda" and first.role == "ours":
            rivals += filter(None, [models.published(first)])
        for _, batch, prompt, new in tqdm(list(cases), desc=name, leave=False):
            input_ids = prompt_of(options, name, first.vocab, batch, prompt, device)
            facts = {"case": name, "shape": (batch, input_ids.shape[1], new), "dtype": type_name(dtype)}
            checked = agreement(rivals, input_ids, new, name)
            if options.prompt is not None:
                text = first.generate(input_ids[:1], new, sampling_of(options))[0]
                print(tokenizer_of(name).decode(text, skip_special_tokens=True))
            timed = times(rivals, input_ids, new, options, machine)
            for rival in rivals:
                row = facts | {"name": rival.name, "role": rival.role}
                yield row | timed[rival.name] | checked.get(rival.name, {})
        del rivals, first
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def prompt_of(options, name, vocab, batch, seqlen, device):
    """(B, L) tokens: random ones, or those of --prompt in every row."""
    if options.prompt is None:
        most = min(1000, vocab)  # as in the published script
        return torch.randint(1, most, (batch, seqlen), generator=generator_of(0, device), device=device)
    return tokenizer_of(name)(options.prompt, return_tensors="pt").input_ids.to(device).expand(batch, -1)


def tokenizer_of(name):
    """A Pythia's own, but for a random one; else as `python -m mamba_fast.generate` finds it."""
    return load_tokenizer(name if "/pythia" in name else tokenizer_name(name))


def agreement(rivals, input_ids, new, name):
    """Greedy tokens: ours checked, and how many of the published ones are the same, by competitor."""
    texts = {rival.name: rival.generate(input_ids, new, GREEDY) for rival in rivals if rival.role != "other"}
    found = {}
    for rival in rivals:
        if rival.role == "ours":
            found[rival.name] = {"agreement": check(rival.model, texts[rival.name], new, name)}
        elif rival.role == "peer":
            same = texts[rival.name] == texts[rivals[0].name]
            found[rival.name] = {"alike": same[:, -new:].double().mean().item()}
    return found


@torch.no_grad()
def check(model, text, new, name):
    """Greedy tokens of the steps and of the sequence form, held to the logits in twice the precision.

    Each of both may choose a token whose true logit is less than the highest by two errors of a logit, as
    plain PyTorch makes them at this precision, K times over. Raises CheckFailed.
    """
    text = text[:CHECKED_ROWS]
    dtype = model.lm_head.weight.dtype
    exact = copy.deepcopy(model).to(torch.float64 if dtype == torch.float32 else torch.float32)
    want = exact(text[:, :-1], backend="torch", num_last_tokens=new).logits
    plain = model(text[:, :-1], backend="torch", num_last_tokens=new).logits
    tokens = {
        "steps": text[:, -new:],
        "sequence": model(text[:, :-1], num_last_tokens=new).logits.argmax(-1),
    }
    found = {
        "alike": (tokens["steps"] == tokens["sequence"]).double().mean().item(),
        "bound": 2 * K * (plain.to(want.dtype) - want).abs().max().item(),
    }
    for form, chosen in tokens.items():
        found[form] = gap = (want.amax(-1) - want.gather(-1, chosen[..., None])[..., 0]).max().item()
        if not gap <= found["bound"]:
            below = f"{gap:.1e} below the highest logit, bound {found['bound']:.1e}"
            raise CheckFailed(f"{name}, {form}: chose a token {below}")
    return found


def times(rivals, input_ids, new, options, machine):
    """By competitor: ms in all and of the prompt, ms a token behind the first, its limit, tokens a second."""
    (batch, seqlen), sampling = input_ids.shape, sampling_of(options)

    def measured(tokens):
        calls = {r.name: functools.partial(r.generate, input_ids, tokens, sampling) for r in rivals}
        return in_turn(calls, input_ids.device, options.repeats, BUDGET_MS)

    total, prompt = measured(new), measured(1)
    return {
        rival.name: {
            "total": total[rival.name],
            "prompt": prompt[rival.name],
            "token": (total[rival.name]["median"] - prompt[rival.name]["median"]) / (new - 1),
            "token_limit": limit_ms((rival.token_bytes(batch, seqlen + new // 2), 0), machine),
            "tokens_per_s": 1e3 * batch * new / total[rival.name]["median"],
        }
        for rival in rivals
    }


def table(rows):
    """Milliseconds in all, of the prompt and of a token; its time over its limit; tokens a second."""
    lead = {key(row): row for row in rows if row["role"] == "ours"}
    wide = max(len(row["case"]) for row in rows) + 1
    lines = [
        f"{'model':<{wide}}{'batch':>6}{'prompt':>7}{'new':>5}  {'by':<13}{'total ms':>10}{'prompt ms':>10}"
        f"{'ms/token':>10}{'limit':>9}{'/limit':>8}{'tokens/s':>10}{'/ours':>8}"
    ]
    for row in rows:
        batch, prompt, new = row["shape"]
        ours = lead.get(key(row))
        ratio = f"{row['total']['median'] / ours['total']['median']:7.2f}x" if ours else ""
        lines.append(
            f"{row['case']:<{wide}}{batch:>6}{prompt:>7}{new:>5}  {row['name']:<13}"
            f"{row['total']['median']:>10.1f}{row['prompt']['median']:>10.1f}{row['token']:>10.3f}"
            f"{row['token_limit']:>9.3f}{row['token'] / row['token_limit']:>8.2f}"
            f"{row['tokens_per_s']:>10.0f}{ratio}"
        )
    return "\n".join(lines)


def findings(rows):
    """A sentence for each case of ours: its limit, and the published package where it was timed."""
    others = {key(row): row for row in rows if row["role"] == "peer"}
    lines = []
    for row in rows:
        if row["role"] != "ours":
            continue
        batch, prompt, new = row["shape"]
        line = f"{row['case']}, batch {batch}, {prompt} + {new} tokens: "
        line += f"{row['token'] / row['token_limit']:.2f}x the byte limit of a token"
        if key(row) in others:
            ratio = others[key(row)]["total"]["median"] / row["total"]["median"]
            line += f", {ratio:.2f}x the published speed"
        lines.append(line)
    return lines


def key(row):
    return row["case"], tuple(row["shape"]), row["dtype"]
