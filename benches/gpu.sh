#!/usr/bin/env bash
# Tests, tunes and measures on this machine's GPU in at most nine minutes, without network, into one
# results file (gpu.py says more). --quick rehearses it on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout --kill-after=5 535 "${PYTHON:-python3}" benches/gpu.py "$@"
