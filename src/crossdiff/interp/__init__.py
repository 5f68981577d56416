"""What the latents mean: explanations by a language model, and scores that say how good they are."""
