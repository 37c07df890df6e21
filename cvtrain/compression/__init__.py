"""Pruning and quantization; the `compression` group."""
