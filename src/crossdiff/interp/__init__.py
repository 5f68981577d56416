"""What the latents mean: explanations by a language model, and scores of how good they are."""
