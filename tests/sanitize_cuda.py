"""The CUDA kernels on a grid of small cases, for compute-sanitizer: every layout, packing and cut once.

    compute-sanitizer --tool memcheck python tests/sanitize_cuda.py

prints a line a case. `make sanitize` runs memcheck, racecheck and initcheck.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from cases import at_precision, outcome, weights_of  # noqa: E402
from scan_inputs import scan_inputs  # noqa: E402

from mamba_fast import selective_scan_fn  # noqa: E402

SEQ_IDX = torch.tensor([[0] * 90 + [1] * 3 + [2] * 207, [0] * 128 + [1] * 172])
CU_SEQLENS = torch.tensor([0, 9, 9, 128, 300])
CASES = (
    ({}, {}, {}),
    ({"batch": 1}, {}, {"cu_seqlens": CU_SEQLENS}),
    ({}, {}, {"seq_idx": SEQ_IDX}),
    ({"B": "grouped", "C": "constant"}, {}, {}),
    ({"seqlen": 77, "d_inner": 19}, {}, {}),
    ({"batch": 1, "d_inner": 5, "seqlen": 4100}, {}, {}),  # cut into stretches
    ({"d_inner": 70}, {"deterministic": True}, {}),
    *(({"batch": 1, "d_inner": rows}, {}, {}) for rows in (1200, 2600, 4400)),
)


def main():
    for sizes, options, packing in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            size = {"batch": 2, "d_inner": 6, "seqlen": 300, "d_state": 3} | sizes
            inputs = at_precision(
                scan_inputs(0, **size, initial_state="cu_seqlens" not in packing), dtype, "cuda"
            )
            rows = len(CU_SEQLENS) - 1 if "cu_seqlens" in packing else None
            moved = {k: v.cuda() for k, v in packing.items()}
            found = outcome(
                selective_scan_fn, inputs, weights_of(inputs, rows), backend="cuda", **options, **moved
            )
            torch.cuda.synchronize()
            assert all(v.isfinite().all() for v in found.values())
            print(size, options, list(packing), dtype, flush=True)


if __name__ == "__main__":
    main()
