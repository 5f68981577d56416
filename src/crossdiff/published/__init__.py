"""Crosscoders that others have published, and publishing ours: formats, tables, the Hub."""
