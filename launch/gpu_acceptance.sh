#!/usr/bin/env bash
# Is it right on this machine, and how fast? Needs no network; writes one JSON.
#   bash launch/gpu_acceptance.sh                      every check; without a GPU at tiny size
#   bash launch/gpu_acceptance.sh --part 1             the checks of correctness (then --part 2)
#   bash launch/gpu_acceptance.sh --only encode,faiss
# What each figure means: benchmarks/acceptance/README.md. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
command -v "$python" >/dev/null || { echo "gpu_acceptance: no '$python': set PYTHON" >&2; exit 2; }
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m acceptance "$@"
