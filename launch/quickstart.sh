#!/usr/bin/env bash
# From nothing to a trained, evaluated and searchable retriever. Run it again to continue after an
# interruption; what is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    extra=gpu
else
    extra=cpu
fi
# shellcheck source=launch/setup.sh
. launch/setup.sh "$extra"
export TOKENIZERS_PARALLELISM=false
[ -e data/pydocs/qrels/train.tsv ] || erniesearch data pydocs --out data/pydocs --max_pairs 8000
erniesearch run configs/quickstart.yaml "$@"
echo
echo "Ask it: . .venv/bin/activate && erniesearch search --run runs/quickstart \"undo the last edit\""
