"""Every key is checked and named; the configurations of the package are what they say they are."""

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from train_inputs import tiny, write_texts

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_fast.train import ConfigError, DataError, Run, TrainConfig, load_config
from mamba_fast.train.__main__ import main, parse
from mamba_fast.train.config import CHOICES, TEXTS, packaged
from mamba_fast.train.data import text_data


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lrr": 1}, r"unknown key lrr; did you mean 'lr'\?"),
        ({"zzz": 1}, "unknown key zzz; accepted: out, seed, device"),
        ({"model.d_modle": 1}, r"unknown key model\.d_modle; did you mean 'd_model'\?"),
        ({"data.foldr": "x"}, r"unknown key data\.foldr; did you mean 'folder'\?"),
        (
            {"task": "induction", "data.folder": "x"},
            r"unknown key data\.folder; accepted: vocab_size, max_prefix",
        ),
        ({"lr.x": 1}, r"lr\.x: lr is no table"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"steps": 1.5}, r"steps: expected int, got 1\.5"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"graph": 1}, "graph: expected bool, got 1"),
        ({"task": "texts"}, r"task: expected one of \('text', 'induction', 'copying'\), got 'texts'"),
        ({"parallel": "tp"}, r"parallel: expected one of \('ddp', 'fsdp', 'sequence'\), got 'tp'"),
        ({"dtype": "half"}, "dtype: expected one of .*'float16'.*, got 'half'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"lr": float("nan")}, "lr: expected at least 0, got nan"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"betas": "[0.9]"}, r"betas: expected two numbers from 0 up to 1, got \[0\.9\]"),
        ({"betas": "[0.9, 1.0]"}, r"betas: expected two numbers from 0 up to 1, got \[0\.9, 1\.0\]"),
        ({"data.validation": "half"}, r"data\.validation: expected float, got 'half'"),
        ({"data.folder": Path("x")}, r"data\.folder: expected str, got .*Path\('x'\)"),
        ({"task": "induction", "data.max_prefix": "far"}, r"data\.max_prefix: expected int, got 'far'"),
        ({"graph": True}, "graph: expected a task of .*, got 'text'"),
        ({"graph": True, "task": "copying", "dtype": "float16"}, "graph: expected dtype .* got 'float16'"),
    ],
)
def test_errors_name_the_key(tmp_path, changes, message):
    file = tmp_path / "run.toml"
    file.write_text("lr = 0.5\n")
    with pytest.raises(ConfigError, match=rf"run\.toml: {message}"):
        load_config(file, changes)


def test_errors_name_the_file(tmp_path):
    (tmp_path / "bad.toml").write_text("lr = = 1\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: Invalid value"):
        load_config(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="nothing: no such file, and none of the package's: bytes, copying"):
        load_config("nothing")
    (tmp_path / "latin.toml").write_bytes(b'out = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: .*can't decode byte 0xe9"):
        load_config(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: expected a TOML file: "):
        load_config(tmp_path)


def test_a_file_and_flags_make_one_configuration(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("lr = 1\nsteps = 5\n[model]\nd_model = 8\n")
    flags = [str(file), "--lr", "2e-3", "--batch-size", "3", "--set", "model.n_layer=2", "data.files=*.md"]
    options = parse([*flags, "--set", "betas=[0.5, 0.6]", "--graph", "false"])
    config = load_config(options.config, options.changes)
    assert (config.lr, config.steps, config.batch_size, config.graph) == (2e-3, 5, 3, False)
    assert config.model == {"d_model": 8, "n_layer": 2}
    assert (config.data, config.betas) == ({"files": "*.md"}, [0.5, 0.6])
    assert load_config(None, {}) == TrainConfig()


def test_where_a_text_is_wanted_a_number_is_one():
    config = load_config(None, {"out": "2024", "data.folder": "1e3", "data.files": "'*.md'", "steps": "7"})
    assert (config.out, config.data, config.steps) == ("2024", {"folder": "1e3", "files": "*.md"}, 7)
    strings = {k.name for k in fields(TrainConfig) if k.type is str}
    options = inspect.signature(text_data).parameters.values()
    strings |= {f"data.{p.name}" for p in options if isinstance(p.default, str)}
    assert strings == set(TEXTS) | set(CHOICES)  # a choice is none of TOML's values


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"d_model": "wide"}}, "model: d_model: expected int, got 'wide'"),
        ({"model": {"d_model": 0}}, "model: d_model: expected a whole number from 1 to .*, got 0"),
        ({"model": {"ssm_cfg": {"d_sate": 3}}}, "model: ssm_cfg: d_sate: not a keyword of Mamba"),
        ({"device": "gpu"}, "device: expected cpu, cuda or a number as in cuda:1, got 'gpu'"),
        ({"device": "cuda:99"}, r"device: got 'cuda:99', and PyTorch finds \d+ NVIDIA GPUs"),
        ({"backend": "cuda"}, "backend: 'cuda' cannot take this call: it needs an NVIDIA GPU"),
        ({"task": "induction", "seqlen": 2}, "induction: seqlen: got 2; accepted: 3 or more"),
        ({"task": "copying", "data": {"n_tokens": 0}}, "copying: n_tokens: got 0; accepted: 1 to seqlen"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_starts(tmp_path, changes, message):
    write_texts(tmp_path / "texts")
    with pytest.raises(ConfigError, match=message):
        Run(tiny(tmp_path, **changes))


def test_the_command_says_in_a_line_what_is_wrong_and_how_it_ended(tmp_path, capsys):
    write_texts(tmp_path / "texts")
    (tmp_path / "file").write_text("")
    settings = ["--device", "cpu", "--backend", "torch", "--seqlen", "24", "--steps", "2", "--log-every", "1"]
    settings += ["--set", "model.d_model=8", "model.n_layer=1", f"data.folder={tmp_path / 'texts'}"]
    for wrong, message in (
        (["--out", f"{tmp_path / 'file'}"], "Not a directory|exists"),
        (["--set", "data.folder="], "data.folder: expected a folder of text files, got ''"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*settings, *wrong])
    main([*settings, "--out", f"{tmp_path / 'run'}", "--lr", "inf"])
    assert re.fullmatch(r"2 steps, \d+ s, loss not finite: .*curve\.png\n", capsys.readouterr().out)


def test_every_setting_is_documented():
    text = inspect.getdoc(TrainConfig)
    for key in fields(TrainConfig):
        assert key.name in text, key.name


def test_the_schedule():
    config = TrainConfig(steps=110, lr=1.0, warmup=10, schedule="cosine", final_lr=0.1)
    assert [config.lr_at(k) for k in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert config.lr_at(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert config.lr_at(60) == pytest.approx(0.55)
    assert config.lr_at(110) == config.lr_at(200) == pytest.approx(0.1)
    constant = TrainConfig(steps=110, lr=1.0, warmup=4)
    assert [constant.lr_at(k) for k in (0, 3, 50, 110)] == [0.25, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_configuration_is_accepted(name):
    config = load_config(name)
    shape = MambaConfig(**{"vocab_size": 256} | config.model)
    model = MambaLMHeadModel(shape, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    assert {"mamba-130m": 129135360}.get(name, parameters) == parameters
    assert config.out == f"out/{name}"


def test_the_packaged_settings_are_the_papers():
    induction, copying, large = (load_config(name) for name in ("induction", "copying", "mamba-130m"))
    assert (induction.seqlen, induction.batch_size, induction.steps, induction.lr) == (
        256,
        8,
        25 * 8192,
        1e-3,
    )
    assert (copying.seqlen, copying.batch_size, copying.steps, copying.lr) == (4096, 64, 400_000, 1e-4)
    assert large.batch_size * large.accumulate * large.seqlen == 2**19
    induction.device = "cpu"
    induction.graph = False
    sizes = sum(p.numel() for p in Run(induction).model.parameters())
    assert round(sizes, -3) == 74_000


def test_bytes_are_those_of_any_folder(tmp_path):
    """The command of README.md: what the files are called does not matter."""
    write_texts(tmp_path / "texts", documents=40)
    options = parse(["bytes", "--device", "cpu", "--set", f"data.folder={tmp_path / 'texts'}", "seqlen=64"])
    config = load_config(options.config, options.changes | {"out": str(tmp_path / "run")})
    assert Run(config).data.train.count > 10
    with pytest.raises(DataError, match=r"data\.folder: expected a folder of text files, got ''"):
        Run(load_config("bytes", {"out": str(tmp_path / "run"), "device": "cpu"}))


def test_the_vocabulary_is_the_datas_and_not_smaller(tmp_path):
    write_texts(tmp_path / "texts")
    assert Run(tiny(tmp_path)).model.config.vocab_size == 256
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected at least the data's 256, got 100"):
        Run(tiny(tmp_path, model={"vocab_size": 100}))
    with pytest.raises(ConfigError, match="graph: needs an NVIDIA GPU, got device 'cpu'"):
        Run(tiny(tmp_path, graph=True, task="induction"))
