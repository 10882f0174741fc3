"""`mamba_ssm` and `causal_conv1d` served by ours: which names, and that nothing is left behind."""

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from scan_inputs import in_float32, scan_inputs

import mamba_fast
from mamba_fast import compat

PACKAGES = ("mamba_ssm", "causal_conv1d")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in PACKAGES), reason="the published packages are installed"
)


@pytest.fixture(autouse=True)
def no_model_of_transformers_yet(monkeypatch):
    """As in a new process, whatever ran before."""
    for name in [name for name in sys.modules if name.startswith("transformers.models.")]:
        if ".modeling_" in name:
            monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def registered():
    with compat.register() as registration:
        yield registration


def import_system():
    """What `register` may change."""
    modules = {k: v for k, v in sys.modules.items() if k.partition(".")[0] in PACKAGES}
    return modules, list(sys.meta_path)


def run(code):
    """The names that `code` leaves behind."""
    found = {}
    exec(code, found)
    return found


@pytest.mark.parametrize(
    "code, ours",
    [
        ("from mamba_ssm import Mamba as f", "Mamba"),
        ("from mamba_ssm import MambaLMHeadModel as f", "MambaLMHeadModel"),
        ("from mamba_ssm import selective_scan_fn as f", "selective_scan_fn"),
        ("from mamba_ssm import mamba_inner_fn as f", "mamba_inner_fn"),
        ("import mamba_ssm; f = mamba_ssm.ops.selective_scan_interface.mamba_inner_fn", "mamba_inner_fn"),
        ("from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as f", "selective_scan_fn"),
        (
            "from mamba_ssm.ops.triton.selective_state_update import selective_state_update as f",
            "selective_state_update",
        ),
        ("from mamba_ssm.ops.triton.layer_norm import RMSNorm as f", "RMSNorm"),
        ("from mamba_ssm.ops.triton.layernorm import rms_norm_fn as f", "rms_norm_fn"),
        ("from mamba_ssm.modules.mamba_simple import Mamba as f", "Mamba"),
        ("from mamba_ssm.modules.mamba_simple import Block as f", "Block"),
        ("from mamba_ssm.modules.block import Block as f", "Block"),
        ("from mamba_ssm.models.config_mamba import MambaConfig as f", "MambaConfig"),
        ("from mamba_ssm.models.mixer_seq_simple import MixerModel as f", "MixerModel"),
        ("from mamba_ssm.models.mixer_seq_simple import MambaConfig as f", "MambaConfig"),
        ("from mamba_ssm.utils.generation import InferenceParams as f", "InferenceParams"),
        ("from causal_conv1d import causal_conv1d_fn as f", "causal_conv1d_fn"),
        (
            "from causal_conv1d.causal_conv1d_interface import causal_conv1d_update as f",
            "causal_conv1d_update",
        ),
        (
            "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states as f",
            "causal_conv1d_varlen_states",
        ),
    ],
)
def test_a_published_name_is_ours(registered, code, ours):
    assert run(code)["f"] is getattr(mamba_fast, ours)


def test_names_that_only_the_published_package_has(registered):
    found = run(
        "from mamba_ssm.models.mixer_seq_simple import _init_weights, create_block\n"
        "from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf\n"
        "from mamba_ssm.modules.mlp import GatedMLP\n"
        "from mamba_ssm.utils.generation import GenerationMixin, decode\n"
    )
    block = found["create_block"](8, d_intermediate=4)
    assert isinstance(block.mlp, found["GatedMLP"])
    assert isinstance(block.mixer, mamba_fast.Mamba)
    assert issubclass(mamba_fast.MambaLMHeadModel, found["GenerationMixin"])


def test_the_published_example(registered):
    y = run(
        "import torch\n"
        "from mamba_ssm import Mamba\n"
        "x = torch.randn(2, 64, 16)\n"
        "y = Mamba(d_model=16, d_state=16, d_conv=4, expand=2)(x)\n"
    )
    assert y["y"].shape == y["x"].shape


def test_a_reference_is_the_plain_pytorch_form(registered):
    f = run("from mamba_ssm.ops.selective_scan_interface import selective_scan_ref as f")["f"]
    args = in_float32(scan_inputs(1, 2, 5, 9, 3))
    got, want = f(**args), mamba_fast.selective_scan_fn(**args, backend="torch")
    assert f.__name__ == "selective_scan_ref"
    assert torch.equal(got, want)


def test_references_take_the_published_arguments(registered):
    """That of the convolution has no seq_idx before its states; those of the norms may be told to upcast."""
    conv = run("from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref as f")["f"]
    x, weight, states = torch.randn(2, 3, 5), torch.randn(3, 4), torch.randn(2, 3, 3)
    want = mamba_fast.causal_conv1d_fn(x, weight, initial_states=states, return_final_states=True)
    for a, b in zip(conv(x, weight, None, states, True), want, strict=True):
        assert torch.equal(a, b)
    norm = run("from mamba_ssm.ops.triton.layer_norm import rms_norm_ref as f")["f"]
    want = mamba_fast.rms_norm_fn(x, weight[0, :1].expand(5), None)
    assert torch.equal(norm(x, weight[0, :1].expand(5), None, upcast=True), want)
    assert (conv.__name__, norm.__name__) == ("causal_conv1d_ref", "rms_norm_ref")


@pytest.mark.parametrize(
    "code, error",
    [
        ("from mamba_ssm import Mamba2", ImportError),
        ("from mamba_ssm.modules.mamba2 import Mamba2", ImportError),
        ("import mamba_ssm.ops.triton.ssd_combined", ImportError),
        ("from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn", ImportError),
        ("import mamba_ssm; mamba_ssm.Mamba3", AttributeError),
        ("import causal_conv1d.cpp_functions", ImportError),
    ],
)
def test_a_name_that_is_not_here_says_so(registered, code, error):
    with pytest.raises(error, match=r"(Mamba|mamba|causal).*: not served: mamba_fast.compat stands in for"):
        run(code)
    assert run("import mamba_ssm; f = getattr(mamba_ssm, 'Mamba2', None)")["f"] is None


def test_packages_are_found_with_their_versions(registered):
    assert registered.packages == PACKAGES
    for name in PACKAGES:
        assert importlib.util.find_spec(name).origin == compat.__file__
        assert importlib.import_module(name).__version__ == compat.VERSIONS[name]
        for spelling in (name, name.replace("_", "-")):
            assert importlib.metadata.version(spelling) == compat.VERSIONS[name]
        assert importlib.metadata.packages_distributions()[name] == [name.replace("_", "-")]
    assert importlib.metadata.version("numpy") == numpy.__version__
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-package")


def test_nothing_is_left_behind():
    before = import_system()
    compat.register()
    importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    importlib.import_module("causal_conv1d")
    assert import_system() != before
    compat.unregister()
    assert import_system() == before
    assert importlib.util.find_spec("mamba_ssm") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")
    compat.unregister()  # nothing to undo
    assert import_system() == before


def test_a_second_registration_serves_nothing_new_and_ends_alone():
    with compat.register() as first:
        mamba_ssm = importlib.import_module("mamba_ssm")
        with compat.register() as second:
            assert second.packages == ()
        assert importlib.import_module("mamba_ssm") is mamba_ssm
        assert first.packages == PACKAGES
    assert importlib.util.find_spec("mamba_ssm") is None


def test_undone_inside_its_block():
    before = import_system()
    with compat.register():
        compat.unregister()
        assert import_system() == before
    assert import_system() == before


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A `mamba_ssm` on the path, with one submodule and metadata."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("Mamba = 'theirs'\n")
    (tmp_path / "mamba_ssm" / "other.py").write_text("")
    (tmp_path / "mamba_ssm-2.3.0.dist-info").mkdir()
    (tmp_path / "mamba_ssm-2.3.0.dist-info" / "METADATA").write_text("Name: mamba_ssm\nVersion: 2.3.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


@pytest.mark.parametrize("imported", [False, True])
def test_an_installed_package_stays(installed, imported):
    if imported:
        importlib.import_module("mamba_ssm.other")
    before = import_system()
    with compat.register() as registration:
        assert registration.packages == ("causal_conv1d",)
        assert importlib.import_module("mamba_ssm").Mamba == "theirs"
        assert importlib.metadata.version("mamba_ssm") == "2.3.0"
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'mamba_ssm\.ops'"):
            importlib.import_module("mamba_ssm.ops")
    if imported:
        assert import_system() == before


def test_an_installed_package_is_replaced_by_force_and_comes_back(installed):
    theirs = importlib.import_module("mamba_ssm.other")
    before = import_system()
    with compat.register(force=True) as registration:
        assert registration.packages == PACKAGES
        assert importlib.import_module("mamba_ssm").Mamba is mamba_fast.Mamba
        assert importlib.metadata.version("mamba_ssm") == compat.VERSIONS["mamba_ssm"]
        with pytest.raises(ImportError, match="not served"):
            importlib.import_module("mamba_ssm.other")
    assert import_system() == before
    assert importlib.import_module("mamba_ssm.other") is theirs
    assert importlib.metadata.version("mamba_ssm") == "2.3.0"


def test_a_folder_of_that_name_is_not_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with compat.register() as registration:
        assert registration.packages == PACKAGES
        assert importlib.import_module("mamba_ssm").Mamba is mamba_fast.Mamba


def test_somebody_elses_stand_in_stays(monkeypatch):
    stub = type(sys)("mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm", stub)
    with compat.register() as registration:
        assert registration.packages == ("causal_conv1d",)
        assert importlib.import_module("mamba_ssm") is stub


def test_importing_it_registers_nothing():
    code = "import mamba_fast.compat, importlib.util as u; print(u.find_spec('mamba_ssm'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "None\n")


def section(name):
    """The fenced blocks between two marks of the page."""
    page = (Path(__file__).parents[2] / "docs" / "compat.md").read_text("utf-8")
    marked = re.search(rf"<!-- {name} -->(.*?)<!-- /{name} -->", page, re.DOTALL)[1]
    return re.findall(r"```(?:python|text)\n(.*?)```", marked, re.DOTALL)


def test_the_page_lists_what_is_served():
    (listed,) = section("served")
    lines = [f"{module}: {', '.join(names)}" for module, names in compat.MODULES.items() if names]
    assert listed.splitlines() == lines


def test_the_example_prints_what_the_page_says(capsys):
    code, printed = section("example")
    before = import_system()
    run(code)
    assert capsys.readouterr().out == printed
    assert import_system() == before
