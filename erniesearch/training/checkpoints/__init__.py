"""Checkpoints that are whole or absent, and the weights that come out of them."""
