"""What a run left: its search system, and its models by their folders.

python examples/load_and_search.py RUN QUERY
"""

import sys

from erniesearch import load

run_dir, query = sys.argv[1:]
system = load(run_dir)  # dual-encoder, late interaction over its best, cross-encoder over theirs
result = system.search(query, depth=3, late_interaction_depth=20, cross_encoder_depth=10)
for hit in result.hits:
    print(hit.pid, hit.scores)

encoder = load(f"{run_dir}/exports/dual_encoder")
vector, passages = encoder.vectors([query], "query"), [hit.text for hit in result.hits]
print("dual-encoder", vector @ encoder.vectors(passages, "passage").T)
scorer = load(f"{run_dir}/exports/cross_encoder")
print("cross-encoder", scorer.scores([query] * len(passages), passages))
