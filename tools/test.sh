#!/usr/bin/env bash
# The tests, in the demo's environment. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh
exec "$OCTO_PYTHON" -m pytest "$@"
