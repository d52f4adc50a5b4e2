"""Sparse autoencoders: what they are, how they compute, where they come from."""
