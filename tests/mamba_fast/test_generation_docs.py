"""The page on generation: its example prints what it says, its arguments and flags exist."""

import contextlib
import inspect
import io
import re
from pathlib import Path

from mamba_fast import MambaLMHeadModel, generate, generation

VALUES = {"--model-name": "folder", "--tokenizer": "folder", "--genlen": "3", "--topk": "2", "--minp": "0.1",
    "--seed": "1", "--device": "cpu", "--dtype": "float32",
}  # fmt: skip
PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text("utf-8")


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)[1]


def test_the_example_prints_what_the_page_says():
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", section("example"), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "generation.md", "exec"), {})
    assert out.getvalue() == printed


def test_the_arguments_are_those_of_the_function():
    found = {}
    for function in (MambaLMHeadModel.generate, generation.decode):
        found |= inspect.signature(function).parameters
    for name in ("self", "model", "kwargs", "input_ids", "max_length"):
        del found[name]
    rows = [[c.strip() for c in row.strip("|").split("|")] for row in section("arguments").splitlines()[2:]]
    said = {name: default for names, default, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert said == {name: str(parameter.default) for name, parameter in found.items()}


def test_the_command_has_the_flags_of_the_page():
    line = re.search(r"python -m mamba_fast\.generate (.*?)\n```", PAGE, re.DOTALL)[1].replace("\\\n", "")
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
    options = generate.parse(words)
    assert (options.model_name, len(options.prompt)) == ("state-spaces/mamba-2.8b", 1)
    assert generate.sampling_of(options) == dict(
        top_k=0, top_p=0.9, min_p=0.0, temperature=0.7, repetition_penalty=1.2
    )
    flags = set(re.findall(r"`(--[\w-]+)`", PAGE.split("## How fast")[0])) - {"--prompt", "--topp"}
    generate.parse(["--prompt", "a", *(w for flag in sorted(flags) for w in (flag, VALUES[flag]))])
