"""Scores and losses: tensors in, tensors out."""
