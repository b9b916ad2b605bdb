"""From files to batches: formats, corpora, BM25, sampler, collator."""
