"""Comparisons between runs and between coders: the null diff, seeds, architectures."""
