"""Train the induction heads of notebook 09 and write them here, as `09_induction`: a few minutes on one core.

python notebooks/weights/train_09.py [seed] [folder] [minutes]
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from mamba_fast.reproduce import induction

LENGTHS = [2**k for k in range(5, 15)]  # the run ends when a few sequences of each of them are all right


def main(seed="1", folder=Path(__file__).parent / "09_induction", minutes="20"):
    with tempfile.TemporaryDirectory() as work:
        options = Namespace(quick=True, device=torch.device("cpu"), work=Path(work), minutes=float(minutes))
        result, lines = induction.trained(options, int(seed), until=LENGTHS)
    print(f"{result.step} steps, {result.seconds:.0f} s, {lines[-1]}")
    result.model.save_pretrained(folder, format="hf")


if __name__ == "__main__":
    main(*sys.argv[1:])
