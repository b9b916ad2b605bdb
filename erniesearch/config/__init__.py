"""The configuration: its documented keys, how it is read, and what is checked."""
