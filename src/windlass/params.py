"""Sampling parameters of one request: vLLM's names and defaults. Knows no tensors."""
