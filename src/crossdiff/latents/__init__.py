"""What each latent is: decoder geometry, latent scaling, activity, examples, and the table that joins them."""
