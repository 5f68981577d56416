"""Paired activations: harvested from the two models, kept in shards, read in shuffled batches."""
