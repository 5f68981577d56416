"""Paired activations: harvesting them from two models, storing them, and reading them in shuffled batches."""
