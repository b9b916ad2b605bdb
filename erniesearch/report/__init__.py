"""``report.html``: a run, an ablation or benchmarks as one page without outside resources."""
