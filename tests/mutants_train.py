"""The bugs put into training, slices of a sequence, and what stands in for other packages; see mutants.py."""

FAST, TRAIN = "mamba_fast/", "mamba_fast/train/"
LOOP, RESUMES, DATA, SLICES, SPLITS, COMPAT, EVALUATES = (
    f"mamba_fast/test_{name}.py::"
    for name in (
        "train_loop", "train_resume", "train_data", "scan_slices", "sequence_split", "compat", "evaluate",
    )
)  # fmt: skip

ROWS = (
    ("A_log decays", FAST + "init.py", "marked or parameter.dim() < 2", "parameter.dim() < 2",
     LOOP + "test_one_step_is_adamw_by_hand"),
    ("every rank takes the rows of the first", TRAIN + "run.py",
     "self.processes.row_rank * self.config.batch_size * self.config.accumulate", "0",
     LOOP + "test_ranks_share_the_rows_of_a_step[copying]"),
    ("a run that goes on counts its steps from zero", TRAIN + "run.py",
     'self.step, self.seconds, self.finished = state["step"], state["seconds"], state["finished"]',
     'self.seconds, self.finished = state["seconds"], state["finished"]',
     RESUMES + "test_a_run_that_has_ended_takes_no_more_steps"),
    ("a document predicts the next one's first token", TRAIN + "data.py",
     "tokens[:, 1:].masked_fill(seq[:, 1:] != seq[:, :-1], IGNORED)", "tokens[:, 1:]",
     DATA + "test_rows_hold_every_token_once_with_the_next_one_as_label"),
    ("a slice decays by its own sum once more", "mamba_fast/ops/selective_scan/slices.py",
     "torch.cat([total[1:], torch.zeros_like(total[:1])])", "total",
     SLICES + "test_slices_add_up[False]"),
    ("the gradient of the last state stays with its rank", FAST + "distributed/slice_scan.py",
     "            flow = flow + dlast\n", "            pass\n", SPLITS + "test_every_backend[torch]"),
    ("an installed package is put aside unasked", FAST + "compat.py",
     "if force or not _is_installed(name)", "if True",
     COMPAT + "test_somebody_elses_stand_in_stays"),
    ("modules put aside do not come back", FAST + "compat.py",
     "        sys.modules.update(self._aside)\n", "",
     COMPAT + "test_an_installed_package_is_replaced_by_force_and_comes_back"),
    ("the error without lm-eval is that of the import", FAST + "evaluate.py",
     "raise SystemExit(str(error)) from None", "raise SystemExit(str(error.__cause__)) from None",
     EVALUATES + "test_the_error_without_the_harness_names_the_extra[lm_eval]"),
)  # fmt: skip
