"""A classifier on a model's own activations: the latent guard, its threshold, and what it can be trusted with."""
