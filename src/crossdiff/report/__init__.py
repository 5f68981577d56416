"""The report of one run: a typed reading of the run directory, its figures, the HTML page and the terminal summary."""
