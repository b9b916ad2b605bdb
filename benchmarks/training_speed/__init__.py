"""Seconds of a training step here and in sentence-transformers, on the same batches."""
