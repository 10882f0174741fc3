"""Measured speed, published only beside its checks: ``python -m mamba_fast.bench NAME``."""
