#!/usr/bin/env bash
# Seconds of a training step, of encoding and of reranking, here and in sentence-transformers, at the
# same work, in one JSON:
#
#   bash launch/training_speed.sh --data data/squad-chunk --precision bf16 --out speed.json
#
# --help lists the options. sentence-transformers is to be installed beside erniesearch, here or in
# the environment of --peer-python. OMP_NUM_THREADS (1) is the number of threads of every system.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m training_speed "$@"
