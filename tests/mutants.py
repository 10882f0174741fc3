"""Bugs put in on purpose, one at a time, and the test that must notice each of them.

    python tests/mutants.py

prints them as the table of docs/mutants.md. tests/run_mutants.py applies them to a copy of the
sources, and tests/test_mutants.py asserts that none survives.
"""

from dataclasses import dataclass
from pathlib import Path

from mutants_cuda import ROWS
from mutants_decode import ROWS as DECODE_ROWS
from mutants_loss import ROWS as LOSS_ROWS
from mutants_model import ROWS as MODEL_ROWS
from mutants_train import ROWS as TRAIN_ROWS

SCAN = "mamba_fast/ops/selective_scan/"
AGREES = "mamba_fast/test_selective_scan.py::"
PROPERTIES = "mamba_fast/test_properties.py::"
UPDATE, UPDATES = "mamba_fast/ops/selective_state_update/", "mamba_fast/test_selective_state_update.py::"
NORM, NORMS = "mamba_fast/ops/rms_norm/", "mamba_fast/test_rms_norm.py::"
CONV, CONVS = "mamba_fast/ops/causal_conv1d/", "mamba_fast/test_causal_conv1d.py::"
INNER, INNERS = "mamba_fast/ops/mamba_inner/", "mamba_fast/test_mamba_inner.py::"


@dataclass(frozen=True)
class Mutant:
    """One bug: `old` stands exactly once in `file`, and with `new` in its place `check` must fail."""

    name: str
    file: str
    old: str
    new: str
    check: str

    @property
    def backend(self):
        """Whose code is broken: a backend, the reference, or what all backends share."""
        if self.file.startswith("mamba_ref/"):
            return "reference"
        if Path(self.file).suffix in (".cu", ".cuh"):
            return "cuda"
        room = Path(self.file).stem.split("_")[0]
        return room if room in ("torch", "numba", "triton") else "all"


NUMBA = (
    Mutant("the decay of the step before", SCAN + "numba_forward.py",
           "exp2(x_t[DELTA + j] * v_n[A_N + j])", "exp2(w[max(t - 1, 0), DELTA + j] * v_n[A_N + j])",
           AGREES + "test_every_length[numba-2]"),
    Mutant("the state is kept in float16", SCAN + "numba_forward.py",
           "v_n[H + j] = h\n", "v_n[H + j] = np.float16(h)\n",
           AGREES + "test_every_length[numba-31]"),
    Mutant("C in the place of B", SCAN + "numba_forward.py",
           "(B_t * v_n[B_LANES + j])", "(C_t * v_n[C_LANES + j])",
           AGREES + "test_every_length[numba-1]"),
    Mutant("the initial state is ignored", SCAN + "numba_forward.py",
           "F(0) if varlen else table[b, d + j, n]", "F(0)",
           AGREES + "test_every_length[numba-2]"),
    Mutant("a packed sequence goes on from the state of the one before it", SCAN + "numba_forward.py",
           "if packed and start[t]:", "if packed and start[t] and row[t] >= 0:",
           AGREES + "test_packed_rows[numba-5-False]"),
    Mutant("softplus is the identity above 2, not above 20", SCAN + "numba_math.py",
           "return x if x > F(20)", "return x if x > F(2)",
           AGREES + "test_every_length[numba-31]"),
    Mutant("the last step of a chunk is not written", SCAN + "numba_forward.py",
           "for t in range(where[4]):\n            out[t] =",
           "for t in range(where[4] - 1):\n            out[t] =",
           AGREES + "test_every_length[numba-33]"),
    Mutant("the last step of a chunk is not read", SCAN + "numba_math.py",
           "row = rows[j]\n        for t in range(where[4]):",
           "row = rows[j]\n        for t in range(where[4] - 1):",
           AGREES + "test_every_length[numba-1]"),
    Mutant("exp2 without the highest term of its polynomial", SCAN + "numba_math.py",
           "p = F(1.5594678e-4)", "p = F(0)",
           AGREES + "test_every_length[numba-31]"),
    Mutant("every sequence reads the B and C of the first", SCAN + "numba_math.py",
           "matrix[b, group, n, t0 + t]", "matrix[0, group, n, t0 + t]",
           AGREES + "test_every_length[numba-2]"),
    Mutant("every channel belongs to the first group", SCAN + "numba_math.py",
           "group = d // (channels // matrix.shape[1])", "group = 0",
           AGREES + "test_every_form_of_B_and_C[numba-grouped-grouped]"),
    Mutant("every chunk is recomputed from the first state", SCAN + "numba_backward.py",
           "states[b, chunk, at, n]", "states[b, 0, at, n]",
           AGREES + "test_every_length[numba-65]"),
    Mutant("ddelta without its term through the decay", SCAN + "numba_backward.py",
           "+= g * decayed * v_n[A_N + j]", "+= F(0)",
           AGREES + "test_every_length[numba-2]"),
    Mutant("dB is not summed over the first channel of a block", SCAN + "numba_backward.py",
           "sum_B += to_B", "sum_B += to_B if j else F(0)",
           AGREES + "test_every_length[numba-1]"),
    Mutant("the slope of SiLU has a wrong sign", SCAN + "numba_backward.py",
           "s * (F(1) + gate[t] * (F(1) - s))", "s * (F(1) - gate[t] * (F(1) - s))",
           AGREES + "test_every_length[numba-1]"),
    Mutant("the gradient of the last state is dropped", SCAN + "numba_backward.py",
           "F(0) if varlen else dlast[b, d + j, n]", "F(0)",
           AGREES + "test_every_length[numba-1]"),
    Mutant("the adjoint of a packed sequence flows into the one before it", SCAN + "numba_backward.py",
           "if packed and end[t]:", "if packed and end[t] and row[t] >= 0:",
           AGREES + "test_packed_rows[numba-5-False]"),
    Mutant("lanes that a narrow block leaves free keep the block before it", SCAN + "numba_backward.py",
           "lanes[:], w[:], h[:] = F(0), F(0), F(0)", "lanes[:] = F(0)",
           PROPERTIES + "test_a_large_batch_of_partly_filled_blocks[numba]"),
    Mutant("an empty sequence loses its state", SCAN + "numba_scan.py",
           "last = table.clone(memory_format=torch.contiguous_format)",
           "last = torch.zeros_like(table, memory_format=torch.contiguous_format)",
           AGREES + "test_packed_by_cumulative_lengths[numba-5-True]"),
)  # fmt: skip

TRITON = (
    Mutant("a tile starts from zero, not from what the tile before it left", SCAN + "triton_forward.py",
           "carry = tl.load(state_ptrs + n, mask=mask_d, other=0.0)",
           "carry = tl.load(state_ptrs + n, mask=mask_d & (k == 0), other=0.0)",
           PROPERTIES + "test_triton_scans_its_tiles[in turn-rows]"),
    Mutant("the chain of tiles forgets their decay", SCAN + "triton_forward.py",
           "h_next = tl.exp2(A2 * total) * h + local", "h_next = h + local",
           PROPERTIES + "test_triton_scans_its_tiles[parallel-rows]"),
    Mutant("the chain of tiles ignores where a sequence starts", SCAN + "triton_forward.py",
           "tl.load(cut_ptr + b * tiles + k) != 0", "tl.load(cut_ptr + b * tiles + k) < 0",
           PROPERTIES + "test_triton_scans_its_tiles[parallel-seq_idx]"),
    Mutant("a tile hands on the adjoint of more than its first sequence", SCAN + "triton_forward.py",
           "alive = mask & (tl.cumsum(end, axis=1) - end == 0)", "alive = mask",
           PROPERTIES + "test_triton_scans_its_tiles[parallel-seq_idx]"),
    Mutant("the end of a tile is taken before its last step", SCAN + "triton_forward.py",
           "passed = tl.cumsum(Delta, axis=1, reverse=True) - Delta",
           "passed = tl.cumsum(Delta, axis=1, reverse=True)",
           PROPERTIES + "test_triton_scans_its_tiles[parallel-rows]"),
    Mutant("the sum of the steps to come as the difference of two sums", SCAN + "triton_forward.py",
           "passed = tl.cumsum(Delta, axis=1, reverse=True) - Delta",
           "passed = total[:, None] - tl.cumsum(Delta, axis=1)",
           "test_docs.py::test_small_steps_after_large_ones_keep_their_digits"),
    Mutant("a D with gaps between its numbers is read without them", SCAN + "triton_scan.py",
           "v.contiguous() for v in (D, delta_bias, initial_state))\n    y =",
           "v if v is D else v.contiguous() for v in (D, delta_bias, initial_state))\n    y =",
           PROPERTIES + "test_parameters_that_are_views[triton]"),
    Mutant("the steps after the end of the sequence decay the state", SCAN + "triton_tiles.py",
           "return tl.where(mask, Delta, 0.0), slope", "return Delta, slope",
           AGREES + "test_every_length[triton-2]"),
    Mutant("a state crosses the start of a packed sequence inside a tile", SCAN + "triton_tiles.py",
           "h = tl.where(cut != 0, h, decay * carry[:, None] + h)", "h = decay * carry[:, None] + h",
           PROPERTIES + "test_triton_scans_its_tiles[in turn-seq_idx]"),
    Mutant("the adjoint leaves a packed sequence through its first token", SCAN + "triton_tiles.py",
           "tl.where(cut, g1, g1 + m * g2)", "g1 + m * g2",
           PROPERTIES + "test_triton_scans_its_tiles[in turn-seq_idx]"),
    Mutant("the associative operator with its two steps swapped", SCAN + "triton_tiles.py",
           "return a1 * a2, a2 * x1 + x2\n", "return a1 * a2, a1 * x2 + x1\n",
           AGREES + "test_every_length[triton-2]"),
    Mutant("softplus as log(1 + e^x) stands on paper", SCAN + "triton_tiles.py",
           "tl.where(x > 0, x, 0.0) + 2 * s * p", "tl.log(1 + tl.exp(x))",
           PROPERTIES + "test_small_steps_keep_their_digits[triton]"),
    Mutant("the decayed state as the difference of two nearly equal numbers", SCAN + "triton_tiles.py",
           "decayed = decay * carry[:, None] + decayed\n    return decayed",
           "decayed = (decay * carry[:, None] + decayed + x) - x\n    return decayed",
           PROPERTIES + "test_a_strong_decay_keeps_its_digits[triton]"),
    Mutant("dB and dC of every group go to the first", SCAN + "triton_backward.py",
           " + group * strides[2]", "",
           AGREES + "test_every_form_of_B_and_C[triton-grouped-grouped]"),
    Mutant("the gradient skips the gate", SCAN + "triton_backward.py",
           "dy = dout * z * sigmoid(z)", "dy = dout",
           AGREES + "test_every_length[triton-1]"),
    Mutant("ddelta without the slope of softplus", SCAN + "triton_backward.py",
           "ddelta = (ddelta + dBu * u) * slope", "ddelta = ddelta + dBu * u",
           AGREES + "test_every_length[triton-1]"),
)  # fmt: skip

TORCH = (
    Mutant("the state passes the start of a packed sequence", SCAN + "torch_scan.py",
           "torch.where(reset[:, q], zero, a[:, q] * h[:, q - 1])", "a[:, q] * h[:, q - 1]",
           AGREES + "test_packed_rows[torch-5-True]"),
    Mutant("a chunk passes on one step of decay, not their product", SCAN + "torch_scan.py",
           "decay[:, q] *= decay[:, q - 1]", "decay[:, q] *= 1",
           AGREES + "test_every_length[torch-31]"),
    Mutant("the adjoint of a complex decay is not conjugated", SCAN + "torch_scan.py",
           "torch.zeros_like(a[:1])]).conj()", "torch.zeros_like(a[:1])])",
           AGREES + "test_gradcheck_of_complex_A"),
    Mutant("the adjoint crosses the start of a packed sequence", SCAN + "torch_scan.py",
           "stop = torch.cat([reset[1:], torch.ones_like(reset[:1])])", "stop = torch.zeros_like(reset)",
           AGREES + "test_packed_rows[torch-5-True]"),
    Mutant("a sequence ends where it starts", SCAN + "torch_scan.py",
           "change.roll(-1, 0)", "change.clone()",
           AGREES + "test_packed_by_cumulative_lengths[torch-5-True]"),
    Mutant("bfloat16 is computed in bfloat16", SCAN + "torch_scan.py",
           "compute = torch.promote_types(u.dtype, torch.float32)", "compute = u.dtype",
           AGREES + "test_half_precision[torch-dtype1]"),
)  # fmt: skip

SHARED = (
    Mutant("cumulative lengths may fall", SCAN + "arguments.py",
           " or edges != sorted(edges):", ":",
           "mamba_fast/test_arguments.py::test_cu_seqlens_that_do_not_rise_from_0_to_L[edges2]"),
    Mutant("the warning about a missing extra comes at every call", SCAN + "backends.py",
           "_warned.add(choice.missing_extra)", "_warned.add(None)",
           "mamba_fast/test_backends.py::test_one_warning_names_the_missing_extra"),
)  # fmt: skip

REFERENCE = (
    Mutant("a packed row is cut one token late", "mamba_ref/packing.py",
           "*(i for i in range(1, len(row))", "*(i + 1 for i in range(1, len(row))",
           "mamba_ref/test_packing.py::test_seq_idx_clears_the_state_at_every_start"),
    Mutant("ddelta by hand without its term through the decay", "mamba_ref/backward.py",
           "(g * B_t * u_t + decayed * self.A).sum(-1)", "(g * B_t * u_t).sum(-1)",
           "mamba_ref/test_backward.py::test_every_gradient_at_odd_sizes_and_chunks[2-6-5-3-2]"),
    Mutant("the oracle reads the input one token late", "mamba_ref/selective_scan.py",
           "u, delta = np.asarray(u, np.float64), np.asarray(delta, np.float64)",
           "u, delta = np.roll(np.asarray(u, np.float64), 1, -1), np.asarray(delta, np.float64)",
           "mamba_ref/test_selective_scan.py::test_oracle_gives_the_numbers_worked_out_by_hand"),
    Mutant("groups take channels in turn, not side by side", "mamba_ref/selective_scan.py",
           "x.to(dtype).repeat_interleave(d_inner // x.shape[1], dim=1)",
           "x.to(dtype).repeat(1, d_inner // x.shape[1], 1, 1)",
           "mamba_ref/test_selective_scan.py::test_torch_loop_is_the_oracle_at_odd_sizes[2-6-5-3-2]"),
    Mutant("the associative operator with its two steps swapped", "mamba_ref/parallel_scan.py",
           "return a_1 * a_2, a_2 * b_1 + b_2\n", "return a_1 * a_2, a_1 * b_2 + b_1\n",
           "mamba_ref/test_parallel_scan.py::test_all_algorithms_agree_with_exact_arithmetic"),
    Mutant("a NaN passes as equal to anything", "mamba_ref/checks.py",
           "(np.isnan(got) & np.isnan(want))", "np.isnan(got)",
           "mamba_ref/test_checks.py::test_a_nan_or_infinity_on_one_side_never_passes[nan]"),
    Mutant("a bound of infinity", "mamba_ref/checks.py",
           "self.rel <= self.bound < np.inf", "self.rel <= self.bound",
           "mamba_ref/test_checks.py::test_a_plain_result_with_a_nan_does_not_make_a_usable_bound"),
)  # fmt: skip

STEP = (
    Mutant("every head reads the B of the first group", UPDATE + "triton_update.py",
           "B_ptr + h // B_span * B_strides[1]", "B_ptr + h * 0 * B_strides[1]",
           UPDATES + "test_every_size[triton-size6]"),
    Mutant("y reads the state after it was rounded", UPDATE + "triton_update.py",
           "y = tl.sum(h * C.to(tl.float32), axis=1)",
           "y = tl.sum(h.to(state_ptrs.dtype.element_ty).to(tl.float32) * C.to(tl.float32), axis=1)",
           UPDATES + "test_the_state_keeps_its_type_and_y_has_that_of_x[triton-state1-io1]"),
    Mutant("the state of the sequence is taken, not that of its index", UPDATE + "triton_update.py",
           "tl.load(state_ptrs + row * state_strides[0]", "tl.load(state_ptrs + b * state_strides[0]",
           UPDATES + "test_rows_of_a_larger_cache[triton-size0-dtype0]"),
    Mutant("a step size of a channel's own passes as shared by the head", UPDATE + "triton_update.py",
           "A.strides[-2] == dt.strides[-1] == 0", "A.strides[-2] == 0",
           UPDATES + "test_a_step_size_of_its_own_beside_a_shared_decay[triton]"),
    Mutant("a walk reads the state of a sequence twice", UPDATE + "triton_update.py",
           "_read(b + 1, end,", "_read(b, end,",
           UPDATES + "test_triton_walks_over_any_number_of_sequences[False-2-5]"),
    Mutant("a padded row writes the first state", UPDATE + "torch_update.py",
           "state[row[live]] = h[live].to(state.dtype)", "state[row] = h.to(state.dtype)",
           UPDATES + "test_a_negative_index_is_padding[torch-0]"),
)  # fmt: skip

SUM_AND_NORM = (
    Mutant("the mean over the tile, not over the row", NORM + "triton_norm.py",
           "tl.sum(s * s, axis=1) / WIDTH", "tl.sum(s * s, axis=1) / BLOCK",
           NORMS + "test_every_size[triton-shape3-True]"),
    Mutant("the gradient of a layer norm without its mean", NORM + "triton_norm.py",
           "mean = tl.sum(along, axis=1)[:, None] / WIDTH", "mean = tl.zeros((ROWS, 1), tl.float32)",
           NORMS + "test_every_size[triton-shape3-False]"),
    Mutant("the gradient of the sum does not reach x", NORM + "triton_norm.py",
           "* rstd + ds[k]", "* rstd",
           NORMS + "test_a_gradient_of_the_sum_alone[triton]"),
    Mutant("what the last program found for dweight is lost", NORM + "triton_norm.py",
           "mask = (rows < programs)[:, None]", "mask = (rows < programs - 1)[:, None]",
           NORMS + "test_triton_cuts_rows_in_any_way[13-2-3]"),
    Mutant("the norm reads the sum after it was rounded", NORM + "torch_norm.py",
           "centred = s if rms", "s = s.to(sum_dtype).to(compute)\n    centred = s if rms",
           NORMS + "test_the_norm_reads_the_sum_before_it_is_rounded[torch]"),
)  # fmt: skip

CONVOLUTION = (
    Mutant("a group of steps is taken for the one before it", CONV + "triton_forward.py",
           "offs_l - UNIT, mask_d", "offs_l, mask_d",
           CONVS + "test_every_length[triton-33-rows]"),
    Mutant("the initial states from the newest to the oldest", CONV + "triton_steps.py",
           "+ k * strides[2]", "+ (WIDTH - 2 - k) * strides[2]",
           CONVS + "test_every_length[triton-2-rows]"),
    Mutant("the taps reach into the packed sequence before", CONV + "triton_steps.py",
           "x = tl.where(reach >= j, x, 0.0)", "x = tl.where(reach >= 0, x, 0.0)",
           CONVS + "test_packed_rows[triton-4-True-columns]"),
    Mutant("the last steps of a walk do not hear from those after it", CONV + "triton_backward.py",
           "dp += (deactivate(dy, p, reach[k], SILU, PACKED),)", "dp += (tl.zeros_like(p),)",
           CONVS + "test_every_length[triton-65-columns]"),
    Mutant("a program leaves its last batch element out", CONV + "triton_backward.py",
           "tl.minimum(part * rows + rows, batch)", "tl.minimum(part * rows + rows, batch - 1)",
           CONVS + "test_programs_share_out_a_channel[triton-5-40-rows]"),
    Mutant("the last share of dweight is lost", CONV + "triton_backward.py",
           "mask = (p + rows < parts)", "mask = (p + rows < parts - 1)",
           CONVS + "test_every_length[triton-2-rows]"),
    Mutant("a token goes into the slot after its own", CONV + "triton_update.py",
           "(head + i) % STATE", "(head + i + 1) % STATE",
           CONVS + "test_token_by_token_is_the_whole[triton-4-4-parts0-True]"),
    Mutant("a sequence goes on after another one between", CONV + "torch_conv.py",
           "same = same & (padded", "same = (padded",
           CONVS + "test_packed_rows_that_are_shorter_than_the_taps[torch]"),
)  # fmt: skip

BLOCK = (
    Mutant("out_proj's bias has one gradient for all", INNER + "fused_inner.py",
           "dout.sum(0)", "dout.sum().expand_as(t.out_bias)",
           INNERS + "test_every_option[numba-1-all]"),
    Mutant("the rows of B and C change places", INNER + "parts.py",
           "x_dbl[:, rank : rank + rows]", "x_dbl[:, x_dbl.shape[1] - rows :]",
           INNERS + "test_every_option[torch-1-plain]"),
    Mutant("u hears of its loss by the scan alone", INNER + "fused_inner.py",
           "addmm_(t.x_proj.T, dx_dbl)", "addmm_(0 * t.x_proj.T, dx_dbl)",
           INNERS + "test_every_option[numba-1-plain]"),
    Mutant("the norm of delta is left out of the backward", INNER + "fused_inner.py",
           "ddelta, ddelta_rms = normed_backward(", "_, ddelta_rms = normed_backward(",
           INNERS + "test_every_option[numba-1-all]"),
    Mutant("the gradient of a norm's weight from the values before it", INNER + "parts.py",
           "(dy * x_hat).sum", "(dy * v).sum",
           INNERS + "test_every_option[numba-0-all]"),
    Mutant("level 0 keeps as little as level 1", INNER + "fused_inner.py",
           "if settings.level == 0 else ()", "if settings.level < 0 else ()",
           INNERS + "test_a_level_keeps_what_it_says[numba]"),
)  # fmt: skip

CUDA, MODEL, LOSS, DECODE, TRAIN = (
    tuple(Mutant(*row) for row in rows)
    for rows in (ROWS, MODEL_ROWS, LOSS_ROWS, DECODE_ROWS, TRAIN_ROWS)
)  # fmt: skip
MUTANTS = (
    *NUMBA, *TRITON, *CUDA, *TORCH, *SHARED, *STEP, *SUM_AND_NORM, *CONVOLUTION, *BLOCK, *MODEL, *LOSS,
    *DECODE, *TRAIN, *REFERENCE,
)  # fmt: skip


def table():
    """Every mutant as one row of Markdown."""
    head = "| what is broken | backend | file | caught by |\n|---|---|---|---|"
    rows = [
        f"| {m.name} | {m.backend} | `{Path(m.file).name}` | `{m.check.split('::')[1]}` |" for m in MUTANTS
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    print(table())
