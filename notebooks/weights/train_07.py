"""Train the byte model of notebook 07, on a GPU if there is one, and write it here, as `07_bytes`.

Usage: python notebooks/weights/train_07.py [steps] [folder]

A step reads 4096 bytes and takes a quarter of a second on one CPU core. The committed weights are those of
1500 steps: about the whole text once.
"""

import sys
from pathlib import Path

import torch

from mamba_fast import MambaConfig, MambaLMHeadModel, param_groups
from mamba_ref.byte_text import bytes_of, fit, standard_library


def main(steps="1500", folder=Path(__file__).parent / "07_bytes"):
    torch.manual_seed(0)
    config = MambaConfig(d_model=96, n_layer=4, vocab_size=256)
    model = MambaLMHeadModel(config, device="cuda" if torch.cuda.is_available() else "cpu")
    text = bytes_of(standard_library()[0])
    losses = fit(lambda ids: model(ids).logits, param_groups(model, 0.1), text, int(steps), seqlen=512)
    print(f"{losses[-100:].mean():.3f} bits per byte over the last 100 steps")
    small = MambaLMHeadModel(config, dtype=torch.float16)  # half the bytes in the file
    small.load_state_dict(model.state_dict())
    small.save_pretrained(folder, format="hf")


if __name__ == "__main__":
    main(*sys.argv[1:])
