"""The paper's results, measured here: `python -m mamba_fast.reproduce NAME`."""
