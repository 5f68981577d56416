"""Loading a pair of models and reaching into them."""
