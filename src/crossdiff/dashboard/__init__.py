"""The dashboard: a diff in the browser, from its overview to single latents and live prompts."""
