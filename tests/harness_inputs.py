"""What lm-eval needs to run without a network: a tiny model, a tokenizer, and tasks of all four kinds."""

import json

import torch

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_ref import MambaLM

BLOCK = dict(d_state=5, d_conv=3, dt_min=0.1, dt_max=1)
D_MODEL, N_LAYER, MAX_LENGTH, EOS = 16, 2, 32, "<|endoftext|>"
WORDS = "a scan reads every state once while the kernel keeps what it wrote in registers".split()
KINDS = {  # output_type: what its YAML says besides
    "multiple_choice": """
doc_to_text: "{{start}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "loglikelihood": """
doc_to_text: "{{start}}"
doc_to_target: rest
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "generate_until": """
doc_to_text: "{{text}}"
doc_to_target: rest
generation_kwargs: {until: ["e", " wh"], max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
}
TASKS = [f"local_{kind}" for kind in KINDS]


def save_tokenizer(folder):
    """A byte-level BPE tokenizer trained on WORDS; the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [EOS], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=290, **options))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def reference_model(vocab_size, seed=0):
    """A `MambaLM` in float64 whose logits are far from equal, and whose greedy text varies."""
    torch.manual_seed(seed)
    model = MambaLM(D_MODEL, N_LAYER, vocab_size, **BLOCK)
    with torch.no_grad():
        model.backbone.embedding.weight *= 20
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight *= 30
        model.backbone.norm_f.weight /= 2
    return model.double()


def save_model(reference, folder, format):
    config = MambaConfig(d_model=D_MODEL, n_layer=N_LAYER, vocab_size=reference.vocab_size, ssm_cfg=BLOCK)
    model = MambaLMHeadModel(config)
    model.load_state_dict(reference.state_dict())
    model.save_pretrained(folder, format=format)


def save_tasks(folder, rows):
    """A YAML file for each kind of task, on `rows` texts: some longer than MAX_LENGTH, one start empty."""
    generator, texts = torch.Generator().manual_seed(1), []
    for k in range(rows):
        picks = torch.randint(len(WORDS), (1 + 5 * k % 29,), generator=generator)
        words = [WORDS[i] for i in picks]
        cut = len(words) // 2
        start, rest = " ".join(words[:cut]), " " + " ".join(words[cut:])
        choices = [rest, " once", " registers", " what it"]
        texts.append(dict(text=start + rest, start=start, rest=rest, choices=choices, gold=k % 4))
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")
    for kind, more in KINDS.items():
        head = (
            f"task: local_{kind}\noutput_type: {kind}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n"
            "target_delimiter: ''"
        )
        (folder / f"{kind}.yaml").write_text(head + more, "utf-8")
