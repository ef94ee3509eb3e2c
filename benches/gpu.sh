#!/usr/bin/env bash
# Tests, measures and tunes on this machine's GPU in at most nine minutes, without network, into the
# folder --output (gpu.py says more). --quick rehearses it on a CPU, without a limit of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
limit=(timeout --kill-after=5 535)
[[ " $* " != *" --quick "* ]] || limit=()
exec "${limit[@]}" "${PYTHON:-python3}" benches/gpu.py "$@"
