"""The bugs put into the CUDA kernels; see mutants.py. Their tests run the kernels on a CPU, emulated."""

SCAN = "mamba_fast/ops/selective_scan/"
AGREES, CUTS = "mamba_fast/test_selective_scan.py::", "mamba_fast/test_cuda_scan.py::"

ROWS = (
    ("a tile begins from the state before the last lane's steps", SCAN + "cuda_forward.cu",
     "if (w.j == LANES - 1) running->y = h;", "if (w.j == LANES - 2) running->y = h;",
     CUTS + "test_every_cut_of_a_warp[dtype0-kinds0]"),
    ("a NaN passes the start of a packed sequence", SCAN + "cuda_forward.cu",
     "cut.starts >> k & 1 ? run.x[k] : fmaf", "cut.starts >> k & 1 ? fmaf(0.f, h, run.x[k]) : fmaf",
     AGREES + "test_nan_stays_in_its_packed_sequence[cuda]"),
    ("the scan over lanes reaches across the start of a sequence", SCAN + "cuda_forward.cu",
     "if (cut.reach_left >= r) h =", "if (w.j >= r) h =",
     AGREES + "test_packed_rows[cuda-5-False]"),
    ("the flow does not pass from one tile to the one before", SCAN + "cuda_backward.cu",
     "    reinterpret_cast<float*>(running)[3 - parity] = flow;\n", "",
     CUTS + "test_every_cut_of_a_warp[dtype0-kinds0]"),
    ("the slope of softplus is left out", SCAN + "cuda_backward.cu",
     "SOFTPLUS ? sigmoid(out[i] + bias) : 1.f", "1.f",
     AGREES + "test_every_length[cuda-33]"),
    ("ordered sums forget the channels of earlier passes", SCAN + "cuda_backward.cu",
     "if (!fresh) first += own->x", "if (false) first += own->x",
     CUTS + "test_ordered_sums_over_several_groups_of_channels_a_block[1]"),
    ("dA keeps the last tile alone", SCAN + "cuda_backward.cu",
     "dA = SHARES > 1 ? *dA_place : 0.f", "dA = 0.f",
     CUTS + "test_every_cut_of_a_warp[dtype0-kinds0]"),
    ("dB and dC in float32 are sums of eleven digits", SCAN + "cuda_backward.cu",
     "if (IO != 2) add_product(sum, rest(", "if (false) add_product(sum, rest(",
     AGREES + "test_every_length[cuda-33]"),
    ("y is written again before its gate", SCAN + "cuda_backward.cu",
     "out[i] = s.y[i] * in[i] * sigmoid(in[i])", "out[i] = s.y[i]",
     "mamba_fast/test_scan_again.py::test_every_layout_and_length[cuda-64-matrix]"),
    ("a stretch hands on its state though a sequence starts in it", SCAN + "cuda_summary.cu",
     "h = total == total ? fmaf", "h = true ? fmaf",
     CUTS + "test_a_sequence_cut_into_stretches[variable-grouped-packing1]"),
)  # fmt: skip
