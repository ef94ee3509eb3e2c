#!/usr/bin/env bash
# The GPU campaign on a CPU, in a copy of the image that a rented GPU comes with: Python 3.12, torch
# 2.11 built for CUDA 13, triton 3.6, transformers 5.17 (constraints/gpu-image.txt). It takes about 5
# GB of disk, so it is no part of .ci/run, which rehearses the campaign in its own environment.
#
#   benches/rehearse.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
image=python3
for one in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
  if "$one" --version >/dev/null 2>&1; then image=$one; fi
done
"$image" -m venv "$work/image"
"$work/image/bin/pip" install --quiet -r constraints/gpu-image.txt
export PYTHON="$work/image/bin/python"
# without the wheels of what the image lacks, a sentence says so and nothing is made
refused=0
benches/gpu.sh --quick --only real --output "$work/refused" 2>"$work/said" || refused=$?
cat "$work/said"
[ "$refused" = 2 ]
grep -q "transformers" "$work/said"
[ ! -e "$work/refused" ]
"$work/image/bin/pip" download --quiet --no-deps -d "$work/wheels" \
  "transformers==5.24.0" "anyascii==0.3.3" "liger-kernel==0.8.5"
benches/gpu.sh --quick --output "$work/gpu" --wheels "$work/wheels"
