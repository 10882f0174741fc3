"""The readable reference of Mamba-1: every part as a loop that can be followed on paper.

The names below are the ones used most; the rest lives in the modules (``mamba_ref.backward``,
``mamba_ref.discretize``, ``mamba_ref.checks``, ...). Import from a module with
``from mamba_ref.selective_scan import ...``: the plain name ``mamba_ref.selective_scan`` is the function.
"""

from mamba_ref.block import MambaBlock
from mamba_ref.model import MambaLM
from mamba_ref.selective_scan import selective_scan, selective_scan_numpy

__all__ = ["MambaBlock", "MambaLM", "selective_scan", "selective_scan_numpy"]
