#!/usr/bin/env bash
# Every check: style, types, layering, and the tests, on up to four cores. Arguments go to pytest
# (e.g. -k resume), and the tests then run one after the other. Tests marked slow (kernels compiled for
# more head dimensions) run with `-m slow`. The suite sees no GPU; where there is one, the tests marked
# cuda follow by themselves.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh dev
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
bash launch/check.sh
if [ $# -gt 0 ]; then
    exec python -m pytest -m "not slow" "$@"
fi
# A test may start four processes, so no more than four at a time. (nproc would say OMP_NUM_THREADS.)
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
python -m pytest -m "not slow" -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -m pytest -m "cuda and not slow"
fi
