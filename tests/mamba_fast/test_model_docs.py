"""The page on the model: its example prints what it says, its numbers are counted."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from mamba_fast import Mamba, MambaConfig, MambaLMHeadModel, check_init

PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text("utf-8")


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)[1]


def test_the_example_prints_what_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", section("example"), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "model.md", "exec"), {})
    assert out.getvalue() == printed


def test_the_table_of_sizes_is_counted():
    _, _, *rows = section("sizes").splitlines()
    assert len(rows) == 5
    for row in rows:
        name, d_model, n_layer, rank, count, weights, states = (c.strip() for c in row.strip("|").split("|"))
        config = MambaConfig(d_model=int(d_model), n_layer=int(n_layer))
        model = MambaLMHeadModel(config, device="meta", dtype=torch.float16)
        assert model.backbone.layers[0].mixer.dt_rank == int(rank), name
        assert sum(p.numel() for p in model.parameters()) == int(count), name
        assert weights == f"{sum(p.nbytes for p in model.parameters()) / 1e6:.0f} MB", name
        cache = model.allocate_inference_cache(1, 0)
        assert states == f"{sum(v.nbytes for pair in cache.values() for v in pair) / 1e6:.1f} MB", name


def test_what_check_init_says():
    block = Mamba(64)
    block.dt_proj.bias.data.zero_()
    (said,) = re.findall(r"```text\n(.*?)\n```", section("lost"), re.DOTALL)
    assert check_init(block) == [said]
