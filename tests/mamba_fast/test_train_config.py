"""Every key is checked and named; the configurations of the package are what they say they are."""

import inspect
import math
from dataclasses import fields

import pytest
from train_inputs import tiny, write_texts

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_fast.train import ConfigError, Run, TrainConfig, load_config
from mamba_fast.train.__main__ import parse
from mamba_fast.train.config import packaged


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


def test_the_vocabulary_is_the_datas_and_not_smaller(tmp_path):
    write_texts(tmp_path / "texts")
    assert Run(tiny(tmp_path)).model.config.vocab_size == 256
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected at least the data's 256, got 100"):
        Run(tiny(tmp_path, model={"vocab_size": 100}))
    with pytest.raises(ConfigError, match="graph: needs an NVIDIA GPU, got device 'cpu'"):
        Run(tiny(tmp_path, graph=True, task="induction"))
