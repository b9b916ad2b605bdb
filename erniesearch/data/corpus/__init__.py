"""A collection as memory-mapped files: texts, their ids, their tokens."""
