"""How good rankings are: systems, metrics, tests, tables."""
