"""What the latents do: patching and steering (METHOD: causal test; Minder, Dumas et al. 2025)."""
