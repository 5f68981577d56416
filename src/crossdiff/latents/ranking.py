"""Which nu rank latents and give the verdicts, and within which range."""

RECONSTRUCTION = "reconstruction"
"""The target whose nu, beside nu_error, ranks latents and gives verdicts: `reconstruction`, as in the published tables, or
`reconstruction_nobias`, without the models' biases and means (docs/latent-scaling.md#negative-ratios)."""
RANKED = ("nu_error", f"nu_{RECONSTRUCTION}")
PLAUSIBLE = (-0.1, 2.0)
"""Range outside of which the published analyses do not rank a latent by its nu."""
