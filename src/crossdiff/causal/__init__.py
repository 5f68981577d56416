"""What the latents do: patching and steering (docs/method.md#causal-test, #steering; Minder, Dumas et al. 2025)."""
