"""The user's notes on latents and concepts: the file that holds them, what they belong to, and their exchange as JSON."""
