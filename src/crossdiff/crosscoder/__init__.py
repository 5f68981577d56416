"""Crosscoders: one shared sparse dictionary with a decoder direction per source."""
