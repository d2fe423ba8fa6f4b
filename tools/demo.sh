#!/usr/bin/env bash
# The whole of OctoThinker, tiny, on this machine: environment, then `octo demo`. Arguments go to it (see --help).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh
exec "$OCTO_PYTHON" -m megatron_octo.cli demo "$@"
