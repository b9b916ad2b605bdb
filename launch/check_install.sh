#!/usr/bin/env bash
# Whether the project installs on an ordinary Linux x86-64 machine: every extra is resolved for
# Python 3.11, 3.12 and 3.13 under the pins of constraints.txt, from the package registry alone:
# no local wheels, no configuration of pip or uv. Only metadata is downloaded.
#   bash launch/check_install.sh
#       exits with 1 on a conflict and with 3 where the registry does not answer
#   bash launch/check_install.sh --lock [OPTION ...]
#       writes constraints.txt anew first. Pins stay where they can; options go to `uv pip compile`,
#       e.g. --upgrade-package transformers
# UV_DEFAULT_INDEX names another registry, SSL_CERT_FILE another bundle of certificates.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}

uv=$PWD/.venv/bin/uv
if [ ! -x "$uv" ]; then  # pip and its configuration bring uv, and nothing else
    "$python" -m venv "$scratch/venv"
    "$scratch/venv/bin/pip" install -qq --disable-pip-version-check -c constraints.txt uv
    uv=$scratch/venv/bin/uv
fi
for name in $(compgen -e UV_ || true); do
    case $name in UV_DEFAULT_INDEX | UV_CACHE_DIR) ;; *) unset "$name" ;; esac
done
export UV_PYTHON_DOWNLOADS=never

read -ra extras < <("$python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])')

if [ "${1:-}" = --lock ]; then
    wanted=()
    for extra in "${extras[@]}"; do
        [ "$extra" = peers ] || wanted+=(--extra "$extra")
    done
    cp constraints.txt "$scratch/new"
    "$uv" pip compile -q pyproject.toml --universal --python-version 3.11 "${wanted[@]}" \
        --no-annotate --no-header -o "$scratch/new" "${@:2}"
    # What holds for every machine that is resolved for goes without saying. CUDA's libraries are
    # left to torch, which names its own, so that the pins serve its builds for other CUDA versions.
    {
        sed '/^[^#]/,$d' constraints.txt
        sed -E -e "s/ and (platform_machine == 'x86_64'|sys_platform == 'linux')//g" \
            -e "s/python_full_version < '3.14' and //; s/ ; python_full_version < '3.14'\$//" \
            -e '/^(nvidia|cuda)-/d' "$scratch/new"
    } > "$scratch/constraints.txt"
    cp "$scratch/constraints.txt" constraints.txt
fi

status=0
# usage: resolve PYTHON_VERSION EXTRA [OPTION ...]
resolve() {
    # DeepSpeed alone comes as source; its metadata are built.
    if "$uv" pip compile -q --no-config --only-binary :all: --no-binary deepspeed \
        --python-version "$1" --python-platform x86_64-manylinux_2_28 --extra "$2" "${@:3}" \
        pyproject.toml > "$scratch/resolved" 2> "$scratch/said"; then
        echo "resolves  Python $1  $2  ($(grep -c '==' "$scratch/resolved") packages)"
    elif grep -q 'No solution found' "$scratch/said"; then
        echo "CONFLICT  Python $1  $2"
        sed 's/^/    /' "$scratch/said"
        status=1
    else
        echo "check_install: Python $1, $2: not a conflict, but no answer from the registry:" >&2
        cat "$scratch/said" >&2
        exit 3
    fi
}

for version in 3.11 3.12 3.13; do
    for extra in "${extras[@]}"; do
        pins=(-c constraints.txt)
        [ "$extra" != peers ] || pins=()  # an environment of their own, with pins of their own
        resolve "$version" "$extra" "${pins[@]}"
    done
done
[ "$status" = 0 ] || echo "check_install: there are conflicts; see above" >&2
exit "$status"
