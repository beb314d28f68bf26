#!/usr/bin/env bash
# One GPU, under eight minutes: check the fused kernels, then measure them, the samplers and steps of training. Goes on
# where an earlier run of this commit stopped.
# Needs torch, transformers and triton. Writes benchmarks/results/gpu.json; see benchmarks/gpu.py --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
