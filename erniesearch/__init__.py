"""ERNIE-Search: cross-encoder, late interaction and dual-encoder trained in one step."""

__version__ = "0.1.0"
