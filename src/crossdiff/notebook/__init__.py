"""The widget of a run for notebooks."""
