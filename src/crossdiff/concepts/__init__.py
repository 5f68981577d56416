"""Concepts: groups of latents, from several trainings, that are active on the same tokens (docs/concepts.md)."""
