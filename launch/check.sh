#!/usr/bin/env bash
# Style, types and layering: what needs no test to run.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
. launch/setup.sh dev
ruff check .
ruff format --check .
mypy
lint-imports
