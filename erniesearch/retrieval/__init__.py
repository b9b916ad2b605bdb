"""Encode, index, search, mine and evaluate."""
