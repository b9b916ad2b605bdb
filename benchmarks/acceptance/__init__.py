"""Acceptance of a machine: is training right on it, and how fast? Started by
``launch/gpu_acceptance.sh``; one process a check, one JSON."""
