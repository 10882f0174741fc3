"""`mamba_ssm` and `causal_conv1d` importable from this package where they are not installed.

What imports them by name, transformers' Mamba, lm-eval or a model of yours, then runs on these kernels.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import warnings

from mamba_fast.block import Block, GatedMLP
from mamba_fast.checkpoints import load_config_hf, load_state_dict_hf
from mamba_fast.config import MambaConfig
from mamba_fast.generation import GenerationMixin, decode
from mamba_fast.inference import InferenceParams
from mamba_fast.init import init_weights
from mamba_fast.mixer import Mamba
from mamba_fast.model import MambaLMHeadModel, MixerModel, create_block
from mamba_fast.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_fast.ops.mamba_inner import mamba_inner_fn
from mamba_fast.ops.rms_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_fast.ops.selective_scan import selective_scan_fn
from mamba_fast.ops.selective_state_update import selective_state_update

__all__ = ["Registration", "register", "unregister"]

# What the packages say of themselves. Below 2.0.4 transformers takes no Mamba-2 functions to be here.
VERSIONS = {"mamba_ssm": "1.2.2+mamba.fast", "causal_conv1d": "1.6.1+mamba.fast"}


def _with_reference(*functions):
    """{name: function}, and its plain PyTorch form under the published name of references."""
    found = {}
    for function in functions:
        found[function.__name__] = function
        name = function.__name__.removesuffix("_fn") + "_ref"
        found[name] = functools.wraps(function)(functools.partial(function, backend="torch"))
        found[name].__name__ = name
    return found


def _named(*objects):
    return {v.__name__: v for v in objects}


def _norm_reference(function):
    """The published references of the norms ask for float32 by `upcast`; here everything is computed so."""

    @functools.wraps(function)
    def reference(*args, upcast=True, **kwargs):
        return function(*args, **kwargs)

    return reference


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """:func:`causal_conv1d_fn` in plain PyTorch, with the published reference's arguments: no seq_idx."""
    states = (initial_states, return_final_states, final_states_out)
    return causal_conv1d_fn(x, weight, bias, None, *states, activation, backend="torch")


_NORMS = _with_reference(layer_norm_fn, rms_norm_fn)
_NORMS |= {k: _norm_reference(v) for k, v in _NORMS.items() if k.endswith("_ref")} | _named(RMSNorm)
_CONV = _with_reference(causal_conv1d_fn, causal_conv1d_update) | _named(causal_conv1d_ref)
MODULES = {  # module: what it holds
    "mamba_ssm": _named(selective_scan_fn, mamba_inner_fn, selective_state_update, Mamba, MambaLMHeadModel),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _with_reference(selective_scan_fn, mamba_inner_fn),
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm": _NORMS,  # its name in 1.x
    "mamba_ssm.ops.triton.selective_state_update": _with_reference(selective_state_update),
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": _named(Block),
    "mamba_ssm.modules.mamba_simple": _named(Mamba, Block),  # 1.x has Block here
    "mamba_ssm.modules.mlp": _named(GatedMLP),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _named(MambaConfig),
    "mamba_ssm.models.mixer_seq_simple": {
        "_init_weights": init_weights,
        **_named(MambaLMHeadModel, MixerModel, create_block, MambaConfig),
    },
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _named(InferenceParams, GenerationMixin, decode),
    "mamba_ssm.utils.hf": _named(load_config_hf, load_state_dict_hf),
    "causal_conv1d": _named(causal_conv1d_fn, causal_conv1d_update),
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": _with_reference(causal_conv1d_varlen_states),
}
_registrations = []


def register(force=False):
    """Make `mamba_ssm` and `causal_conv1d` importable, each where it is not installed.

    Call it before what imports them: a module that has looked for them keeps what it found. `mamba_ssm`
    has the names of Mamba-1 in their published places, the `*_ref` functions included, in plain PyTorch;
    any other name raises ImportError or AttributeError. importlib.util.find_spec finds the packages,
    importlib.metadata.version says "1.2.2+mamba.fast" and "1.6.1+mamba.fast".

    force : also in place of an installed one, whose modules are put aside until :func:`unregister`

    Returns the :class:`Registration`; as a context manager it ends with the block. Warns of the modules of
    transformers that were imported too early.
    """
    packages = [name for name in VERSIONS if force or not _is_installed(name)]
    late = _imported_too_early() if packages else []
    if late:
        warnings.warn(
            f"imported before register(), and keep what they found then: {', '.join(late)}", stacklevel=2
        )
    return Registration(packages)


def unregister():
    """Undo the last :func:`register` that was not undone; nothing if there is none.

    What was imported meanwhile keeps these functions.
    """
    if _registrations:
        _registrations[-1].undo()


class Registration:
    """What one :func:`register` did. packages: the names it serves, none if all are installed."""

    def __init__(self, packages):
        self.packages = tuple(packages)
        self._finder = _Finder(self.packages)
        self._aside = self._take_modules()
        sys.meta_path.insert(0, self._finder)
        _registrations.append(self)
        _forget_what_was_available()

    def undo(self):
        """Leave the import system as it was found; nothing the second time."""
        if self not in _registrations:
            return
        _registrations.remove(self)
        sys.meta_path.remove(self._finder)
        self._take_modules()
        sys.modules.update(self._aside)
        _forget_what_was_available()

    def _take_modules(self):
        """Take every module of the packages out of sys.modules."""
        names = [name for name in sys.modules if name.partition(".")[0] in self.packages]
        return {name: sys.modules.pop(name) for name in names}

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.undo()


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the modules of :data:`MODULES` and the metadata of their packages."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self.packages:
            return None
        if fullname not in MODULES:  # no name on the error: `from package import name` would drop the text
            raise ModuleNotFoundError(_absent(fullname))
        spec = importlib.machinery.ModuleSpec(fullname, _Loader(), origin=__file__, is_package=True)
        spec.has_location = True  # so that messages about the module name this file
        return spec

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        wanted = context.name and re.sub(r"[-_.]+", "_", context.name).lower()
        return [_Distribution(name) for name in self.packages if wanted in (None, name)]


class _Loader(importlib.abc.Loader):
    def exec_module(self, module):
        name = module.__name__
        vars(module).update(MODULES[name], __getattr__=functools.partial(_attribute, name))
        if name in VERSIONS:
            module.__version__ = VERSIONS[name]
            module.__doc__ = f"{name}, from mamba_fast."


def _attribute(module, name):
    """A submodule that nobody has imported yet, as the published packages' own imports would have."""
    full = f"{module}.{name}"
    if full in MODULES:
        return importlib.import_module(full)
    raise AttributeError(_absent(full))


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, package):
        self.package = package

    def read_text(self, filename):
        name = self.package.replace("_", "-")
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSIONS[self.package]}\n",
            "top_level.txt": f"{self.package}\n",
        }.get(filename)

    def locate_file(self, path):
        raise FileNotFoundError(f"{path}: {self.package} is served by mamba_fast.compat and has no files")


def _absent(name):
    package = name.partition(".")[0]
    names = "the public names of Mamba-1" if package == "mamba_ssm" else "its public names"
    return f"{name}: not served: mamba_fast.compat stands in for {package}, with {names} alone"


def _is_installed(package):
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # somebody's module without a spec
        return True
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _imported_too_early():
    names = {"mamba_inner_fn", "selective_scan_fn", "causal_conv1d_fn"}
    return sorted(
        name
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.") and ".modeling_" in name and names & vars(module).keys()
    )


def _forget_what_was_available():
    """transformers asks once for each package, and keeps the answer."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_mamba_ssm_available", "is_mamba_2_ssm_available", "is_causal_conv1d_available"):
        clear = getattr(getattr(utils, name, None), "cache_clear", None)
        if clear is not None:
            clear()
