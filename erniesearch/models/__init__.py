"""Student encoder, cross-encoder and the joint module."""
