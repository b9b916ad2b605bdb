"""The engine, the loop and checkpoints."""
