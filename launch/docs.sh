#!/usr/bin/env bash
# The documentation site in English and Chinese, into site/; a broken link or reference is an error.
#   bash launch/docs.sh          builds it (`python -m http.server -d site` shows it)
#   bash launch/docs.sh serve    shows it at http://127.0.0.1:8000 and again after every change
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in "" | serve) ;; *) echo "docs: '$1': nothing, or serve" >&2; exit 2 ;; esac
# shellcheck source=launch/setup.sh
. launch/setup.sh docs
export NO_MKDOCS_2_WARNING=1  # mkdocs stays below 2; DESIGN.md says what follows Material
if [ "${1:-}" = serve ]; then
    exec python -m mkdocs serve --watch README.md --watch README.zh-CN.md --watch DESIGN.md
fi
exec python -m mkdocs build --strict
