"""Patching and steering: what the latents do (docs/method.md#causal-test, docs/method.md#steering; Minder, Dumas et al. 2025)."""
