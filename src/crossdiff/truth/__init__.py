"""Ground truth: activations generated from known concepts, and how well the analysis recovers them."""
