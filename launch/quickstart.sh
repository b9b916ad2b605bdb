#!/usr/bin/env bash
# From nothing to a trained, evaluated and searchable retriever. Run it again to continue after an
# interruption; what is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh
export TOKENIZERS_PARALLELISM=false
[ -e data/pydocs/qrels/train.tsv ] || erniesearch data pydocs --out data/pydocs --max_pairs 5000
erniesearch run configs/quickstart.yaml "$@"
echo
echo "Ask it: . .venv/bin/activate && erniesearch search --run runs/quickstart \"undo the last edit\""
