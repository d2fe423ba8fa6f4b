#!/usr/bin/env bash
# Makes .venv with everything requirements.txt lists; does nothing when it is already there.
# Sourced by demo.sh and test.sh; leaves the interpreter's path in $OCTO_PYTHON.
#   OCTO_VENV   where the environment goes (default: .venv in the repository)
#   PYTHON      interpreter to build it with (default: the first of python3.11, python3.12, python3 that fits)
set -euo pipefail

octo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
octo_venv=${OCTO_VENV:-$octo_root/.venv}

octo_fail() {
    echo "octo: error: $*" >&2
    exit 6
}

octo_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    octo_fail "Python 3.11 or 3.12 is needed, found $({ ${PYTHON:-python3} --version 2>&1 || true; } | head -n 1); fix: install it, or set PYTHON=/path/to/python3.11"
}

octo_marked() { # the requirements marked "#:$1", e.g. nodeps
    sed -n "s/^#:$1  *\([^ ].*\)$/\1/p" "$octo_root/requirements.txt" | sed 's/  *#.*$//'
}

octo_install() {
    local python began
    python=$(octo_find_python)
    command -v g++ >/dev/null || octo_fail "g++ is missing; fix: install it (Debian: apt-get install g++)"
    began=$SECONDS
    echo "octo: making $octo_venv with $("$python" --version); a few minutes, once" >&2
    if [ -e "$octo_venv" ] && [ ! -e "$octo_venv/pyvenv.cfg" ] && [ -n "$(ls -A "$octo_venv")" ]; then
        octo_fail "$octo_venv holds something that is not a virtual environment; fix: set OCTO_VENV to a new directory"
    fi
    rm -rf "$octo_venv"
    "$python" -m venv "$octo_venv" || octo_fail "$python cannot make a virtual environment; fix: install its venv module (Debian: apt-get install python3-venv)"
    "$octo_venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$octo_root/requirements.txt"
    octo_marked nodeps | xargs "$octo_venv/bin/pip" install --quiet --disable-pip-version-check --no-deps
    "$octo_venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --editable "$octo_root"
    cp "$octo_root/requirements.txt" "$octo_venv/octo-requirements.txt" # written last: a half-made environment is made again
    echo "octo: environment ready after $((SECONDS - began)) s" >&2
}

cmp --silent "$octo_root/requirements.txt" "$octo_venv/octo-requirements.txt" || octo_install
OCTO_PYTHON=$octo_venv/bin/python
export OCTO_PYTHON
