"""Crosscoders that others have published, and publishing ours: formats, tables, the Hub."""

WEIGHTS = ("model.safetensors", "cc_weights.pt", "sae_weights.safetensors")
"""File of the weights in a crosscoder's folder: ours and the fork's of `dictionary_learning`, Kissane's, SAELens'."""
