"""The dashboard: from the overview of a diff to one latent to one prompt, in the browser."""
