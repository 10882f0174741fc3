"""The bugs put into decoding: the step of a whole model in one launch, prompts, sampling; see mutants.py."""

FAST, STEP = "mamba_fast/", "mamba_fast/ops/model_step/"
STEPS, PROMPTS, SAMPLES, TEXTS = (
    f"mamba_fast/test_{name}.py::" for name in ("model_step", "prompt_graphs", "sampling", "generation")
)
MANY_SEQUENCES = "mamba_fast/test_model_step_rows.py::test_logits_and_states[sizes0-11]"
ONE_SEQUENCE = STEPS + "test_one_sequence[sizes0-dtype0]"
PROMPTS_IN_TURN = PROMPTS + "test_prompts_one_after_another[torch-seqlens0]"

ROWS = (
    ("a layer replaces the residual stream", STEP + "model_step.cu",
     "(first ? before : residual(b, outs.first + row)) + rounded(value)", "rounded(value)",
     ONE_SEQUENCE),
    ("the window of the convolution stays where it was", STEP + "step_layer.cuh",
     "      to[k] = entry;\n", "", ONE_SEQUENCE),
    ("a warp's columns are left out of every product", STEP + "step_product.cuh",
     "for (int warp = 0; warp < WARPS; warp++) value +=", "for (int warp = 1; warp < WARPS; warp++) value +=",
     ONE_SEQUENCE),
    ("a prompt goes on from the one before it", FAST + "prompt_graphs.py",
     "seqlen_offset=0 if first else 1", "seqlen_offset=1", PROMPTS_IN_TURN),
    ("the last inputs of a prompt take its padding in", FAST + "sequence.py",
     ".masked_fill(layout.pad[..., -width:], 0)", "", PROMPTS + "test_padding_longer_than_a_piece[torch-10]"),
    ("a product leaves out its last part", FAST + "ops/triton_chain.py",
     "range(1, PARTS)", "range(1, PARTS - 1)", MANY_SEQUENCES.replace("0-11", "3-11")),
    ("what a layer gives takes the place of the residual stream", STEP + "triton_layer.py",
     "        residual += add_parts(", "        residual = add_parts(", MANY_SEQUENCES),
    ("the newest input takes the oldest one's place", FAST + "ops/causal_conv1d/triton_update.py",
     "tl.join(tl.join(x1, x3), tl.join(x2, x0))", "tl.join(tl.join(x0, x2), tl.join(x1, x3))",
     MANY_SEQUENCES),
    ("the padding of a prompt is read as text", FAST + "prompt_graphs.py",
     "self.ids.copy_(ids), self.mask.copy_(mask)", "self.ids.copy_(ids)", PROMPTS_IN_TURN),
    ("top-p leaves out the token that passes it", FAST + "sampling.py",
     "probability.cumsum(-1, dtype=torch.float64) - probability", "probability.cumsum(-1)",
     SAMPLES + "test_what_is_left_to_choose_from_is_exact[top-p]"),
    ("every row draws by the number of the first", FAST + "sampling.py",
     "uniform[:, None] * reached", "uniform[:1, None] * reached",
     SAMPLES + "test_tokens_are_drawn_with_the_filtered_probabilities[everything]"),
    ("padding counts for the penalty", FAST + "generation.py",
     "ids = ids.where(attention_mask != 0, ids[:, -1:])", "ids = ids.clone()",
     TEXTS + "test_a_left_padded_row_is_the_row[None-pen]"),
    ("the random numbers come again after a ring of tokens", FAST + "generation.py",
     "v[done : done + RING]", "v[:RING]", TEXTS + "test_text_longer_than_the_ring"),
    ("several steps are taken though somebody looks at each", FAST + "generation.py",
     "1 if followed else left", "left", TEXTS + "test_several_steps_at_a_time_give_the_same_text[12]"),
)  # fmt: skip
