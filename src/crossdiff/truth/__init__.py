"""Ground truth: activations made from known concepts, and what the analysis makes of them."""
