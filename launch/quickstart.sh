#!/usr/bin/env bash
# From nothing to a trained, evaluated and searchable retriever. Run it again to continue after an
# interruption; what is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh ""  # without an argument it would see those of this script
export TOKENIZERS_PARALLELISM=false
[ -e data/pycode/qrels/train.tsv ] || erniesearch data pycode --out data/pycode --max_pairs 4000
erniesearch run configs/quickstart.yaml "$@"
echo
echo "Ask it: . .venv/bin/activate && erniesearch search --run runs/quickstart \"wait until a process has ended\""
