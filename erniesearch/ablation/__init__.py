"""Ablations: many variants of one configuration, several seeds, one table with paired tests."""
