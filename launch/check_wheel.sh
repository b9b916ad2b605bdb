#!/usr/bin/env bash
# Both wheels, built and started where there is no checkout: in new environments, from another
# folder. The dependencies are those of the Python on PATH (as `source launch/setup.sh` leaves it);
# hatchling comes from the package index unless it is installed.
# Usage: bash launch/check_wheel.sh [DIR]     DIR, if given, keeps wheels/, full/ and kernels/.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME
work=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
work=$(cd "$work" && pwd)

isolation=()
if python -c 'import hatchling' 2>/dev/null; then isolation=(--no-build-isolation); fi
PIP_CONSTRAINT=$PWD/constraints.txt python -m pip wheel -qq --no-deps "${isolation[@]}" \
    -w "$work/wheels" . ./kernels

# install ENVIRONMENT WHEEL: a new environment that also sees the packages of this Python. A folder
# named in a .pth file is searched, but its own .pth files are not read: an editable erniesearch
# stays out of sight.
install() {
    python -m venv --without-pip "$work/$1"
    python -m pip --python "$work/$1/bin/python" install -qq --no-deps "$2"
    python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        >"$("$work/$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"
}
install full "$work"/wheels/erniesearch-*.whl
install kernels "$work"/wheels/erniesearch_kernels-*.whl
mkdir -p "$work/elsewhere"
cd "$work/elsewhere"

"$work/kernels/bin/python" - <<'PY'
import importlib, pkgutil, sys
import torch
import erniesearch_kernels

for module in pkgutil.iter_modules(erniesearch_kernels.__path__):
    try:
        importlib.import_module(f"erniesearch_kernels.{module.name}")
    except ModuleNotFoundError as error:
        assert error.name == "triton", error
tokens = torch.randn(2, 3, 16, requires_grad=True)
erniesearch_kernels.maxsim(tokens, tokens).sum().backward()
assert tokens.grad.isfinite().all()
foreign = {"erniesearch", "transformers", "deepspeed", "faiss"} & set(sys.modules)
assert not foreign, f"the kernels need torch and Triton alone, and imported {foreign}"
assert sys.prefix in erniesearch_kernels.__file__, erniesearch_kernels.__file__
PY

PATH=$work/full/bin:$PATH
version=$(erniesearch --version)
[ "$(python -m erniesearch --version)" = "$version" ]
erniesearch run --help >/dev/null
python - <<'PY'
import importlib, pkgutil, sys
from importlib import metadata
import erniesearch

assert sys.prefix in erniesearch.__file__, erniesearch.__file__
assert metadata.version("erniesearch") == erniesearch.__version__
from erniesearch.commands.parsing import config_parser, name_accelerator, parse_config

name_accelerator()
extras = {"fastapi", "uvicorn", "pydantic", "onnx", "onnxruntime", "onnxscript", "triton"}
for package in ("erniesearch", "erniesearch_kernels"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if module.name != "erniesearch.__main__":
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in extras:
                    raise

from importlib.resources import files

from erniesearch.config.keys import TrainingConfig
from erniesearch.installation import commit, config_names
from erniesearch.training.engine import zero_section

assert {"quickstart", "beir-cpu", "msmarco/en"} <= set(config_names()), config_names()
for name in config_names():
    parse_config(config_parser("train", ""), ["--config", name])
assert zero_section(TrainingConfig(zero_json="zero2"))["stage"] == 2
assert files("erniesearch.search").joinpath("page/page.html").is_file()
assert commit() is None
PY
status=0
erniesearch run quickstart 2>error || status=$?
if [ $status != 2 ] || ! grep -q "^erniesearch: error: data/pycode: no such folder" error; then
    cat error >&2
    exit 1
fi
echo "check_wheel: $version runs without its checkout"
