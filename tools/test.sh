#!/usr/bin/env bash
# The tests, in the demo's environment, two files of them at a time. Arguments go to pytest; -n 0 is one after another.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that share cores must not spin while they wait
# Whole files, since tests of one share what a fixture ran once; in their order, since the longest come first.
exec "$OCTO_PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
