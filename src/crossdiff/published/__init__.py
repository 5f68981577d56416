"""Crosscoders that others have published, and publishing ours: formats, tables, the Hub."""

WEIGHTS = (
    "model.safetensors",
    "cc_weights.pt",
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
    "model_final.pt",
    "params.npz",
)
"""File of the weights in a coder's folder: ours and the fork's of `dictionary_learning`, Kissane's, SAELens', sparsify's,
`dictionary_learning`'s and its fork's local one, and Gemma Scope's."""

LAYOUTS = ("dictionary_learning", "saelens")
"""Layouts of others that crosscoders trained here can be written in, see `writing`."""
