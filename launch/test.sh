#!/usr/bin/env bash
# Every check: style, types, layering, tests. Arguments go to pytest (e.g. -k resume).
# Tests marked slow (kernels compiled for more head dimensions) run with `-m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh dev
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
lint-imports
python -m pytest -m "not slow" "$@"
