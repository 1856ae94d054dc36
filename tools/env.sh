#!/usr/bin/env bash
# Builds .venv with the pinned environment: uv into .tools, Python 3.12, requirements.lock.
# Usage: tools/env.sh            (make env calls it; set PYTHON to a python3.12 to choose one)
set -euo pipefail
cd "$(dirname "$0")/.."

runs_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

# A pyenv shim answers `command -v` and then exits 127, so every candidate is really run.
find_python() {
    local candidate prefix
    for candidate in "${PYTHON:-}" python3.12; do
        if [ -n "$candidate" ] && runs_312 "$candidate"; then command -v "$candidate"; return; fi
    done
    if command -v pyenv >/dev/null; then
        for prefix in "$(pyenv root)"/versions/3.12*; do
            if runs_312 "$prefix/bin/python"; then echo "$prefix/bin/python"; return; fi
        done
    fi
    echo 3.12 # uv finds or downloads one
}

bootstrap_uv() {
    [ -x .tools/bin/uv ] && return
    python3 -m venv .tools || { echo "env: python3 -m venv failed; install it: apt-get install python3-venv" >&2; exit 1; }
    .tools/bin/pip install --quiet --disable-pip-version-check "uv==0.13.9"
}

stamp=.venv/.lock-installed
if [ -f "$stamp" ] && cmp -s requirements.lock "$stamp"; then exit 0; fi
bootstrap_uv
python=$(find_python)
if [ ! -x .venv/bin/python ] && ! .tools/bin/uv venv --quiet --python "$python" .venv; then
    echo "env: no Python 3.12 was found and none could be downloaded; install python3.12 or set PYTHON=/path/to/python3.12" >&2
    exit 1
fi
echo "env: installing the pinned packages into .venv (about 4.4 GB to download the first time)"
.tools/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes requirements.lock
.tools/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
cp requirements.lock "$stamp"
