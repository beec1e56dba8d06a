"""The latent guard: a classifier on activations with a false-positive rate that can be stated."""
