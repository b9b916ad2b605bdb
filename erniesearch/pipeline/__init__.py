"""The stages in order, the steps between them, and how they are started."""
